from __future__ import annotations

import pytest

from trainfleet.monitor.history.thinned import Thinned


@pytest.mark.parametrize("count", [0, 1, 5, 9, 10, 11, 97, 1000, 1024, 4097])
def test_it_stays_short_even_and_keeps_first_and_last(count: int) -> None:
    thinned: Thinned[int] = Thinned(10)
    for number in range(count):
        thinned.append(number)
    kept = list(thinned)
    assert len(kept) == len(thinned) <= 10 and thinned.num_seen == count
    assert kept == sorted(set(kept)) and kept[:1] == [0][:count] and kept[-1:] == [count - 1][:count]
    assert thinned.last == (count - 1 if count else None)
    assert len(kept) >= min(count, 4), "not thinner than it must be"
