"""A rank that the others wait for is named with its phase; ranks that are alike are not."""

from __future__ import annotations

from typing import Any

from trainfleet.events import RanksReported
from trainfleet.monitor.progress import Progress
from trainfleet.monitor.slow_rank import slow_rank


def rank(**phases: float) -> dict[str, Any]:
    return {"host": "here", "device": "cpu", "seconds": sum(phases.values()), "phases": phases, "memory_bytes": 0}


def report(*ranks: dict[str, Any], step: int = 10) -> RanksReported:
    return RanksReported(step=step, steps=10, ranks=ranks)


FAST = rank(data=0.1, forward=2.0, backward=4.0, communication=3.9)
SLOW = rank(data=0.1, forward=5.0, backward=4.5, communication=0.4)


def test_the_slow_rank_is_named_with_the_phase_and_how_much_it_is() -> None:
    found = slow_rank(report(FAST, SLOW, FAST))
    assert found is not None and (found.rank, found.phase) == (1, "forward")
    assert str(found) == (
        "rank 1 on here is slow in forward: 500 ms a step, the others 200 ms; they wait 35% of the time for it"
    )


def test_ranks_that_are_about_alike_are_left_alone_and_one_alone_too() -> None:
    assert slow_rank(report(FAST, rank(data=0.2, forward=2.1, backward=4.2, communication=3.5))) is None
    assert slow_rank(report(SLOW)) is None


def test_a_phase_that_only_one_rank_has_counts() -> None:
    writes = rank(data=0.1, forward=2.0, backward=4.0, observers=3.5, communication=0.4)
    found = slow_rank(report(writes, FAST))
    assert found is not None and (found.rank, found.phase, found.usual_seconds) == (0, "observers", 0.0)


def test_it_is_told_once_until_it_changes() -> None:
    progress = Progress()
    lines = [bool(progress.report(each)) for each in (report(FAST, SLOW), report(FAST, SLOW), report(FAST, FAST))]
    assert lines == [True, False, False]
    assert [bool(progress.report(each)) for each in (report(FAST, SLOW), report(SLOW, FAST))] == [True, True]
