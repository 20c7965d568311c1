"""A rank that the others wait for is named with its phase, once; ranks that are alike, or late once, are not."""

from __future__ import annotations

from typing import Any

from trainfleet.events import RanksReported
from trainfleet.monitor.slow_ranks import SlowRanks


def rank(**phases: float) -> dict[str, Any]:
    return {"host": "here", "device": "cpu", "seconds": sum(phases.values()), "phases": phases, "memory_bytes": 0}


FAST = rank(data=0.1, forward=2.0, backward=4.0, communication=3.9)
SLOW = rank(data=0.1, forward=5.0, backward=4.5, communication=0.4)
OTHER = rank(data=2.6, forward=2.0, backward=4.0, communication=1.4)


def lines(*reports: list[dict[str, Any]]) -> list[str]:
    slow = SlowRanks()
    return [slow.line(RanksReported(step=10 * i, steps=10, ranks=each)) for i, each in enumerate(reports, 1)]


def test_a_rank_that_stays_slow_is_named_with_the_phase_and_how_much_it_is() -> None:
    first, second, third = lines([FAST, SLOW, FAST], [FAST, SLOW, FAST], [FAST, SLOW, FAST])
    assert second == (
        "rank 1 on here is slow in forward: 500 ms a step, the others 200 ms; they wait 35% of the time for it"
    )
    assert first == third == ""


def test_ranks_that_are_alike_alone_or_late_once_are_left_alone() -> None:
    alike = rank(data=0.2, forward=2.1, backward=4.2, communication=3.5)
    assert lines([FAST, alike], [FAST, alike]) == ["", ""]
    assert lines([SLOW], [SLOW]) == ["", ""]
    assert lines([FAST, SLOW], [FAST, FAST], [SLOW, FAST], [FAST, SLOW]) == [""] * 4


def test_another_rank_or_phase_is_told_anew_and_so_is_one_that_had_recovered() -> None:
    told = lines(*[[FAST, SLOW]] * 2, *[[SLOW, FAST]] * 2, *[[OTHER, FAST]] * 2, *[[FAST, FAST]], *[[OTHER, FAST]] * 2)
    assert [bool(line) for line in told] == [False, True, False, True, False, True, False, False, True]
    assert "rank 0 on here is slow in data" in told[-1]
