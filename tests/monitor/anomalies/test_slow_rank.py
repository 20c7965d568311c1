"""The rank that the others wait for is named with its host and the phase."""

from __future__ import annotations

from trainfleet.events import RanksReported
from trainfleet.monitor.anomalies import Finding, SlowRank


def report(number: int, *forwards: float, seconds: float = 10.0, **phases: float) -> RanksReported:
    """Ranks that take so long in forward, and wait for the slowest."""
    ranks = []
    for rank, forward in enumerate(forwards):
        own = {"data": 0.5, "forward": forward, "backward": 2.0}
        more = phases if rank == 0 else {}
        waits = {"communication": max(forwards) - forward + 1.0}
        ranks.append({"host": f"host-{rank}", "device": "cpu", "seconds": seconds, "phases": {**own, **waits, **more}})
    return RanksReported(step=10 * number, steps=10, ranks=ranks)


def found(*reports: RanksReported, lasting: float = 30.0) -> list[Finding]:
    slow = SlowRank(factor=1.5, lasting_seconds=lasting)
    return [each for report in reports if (each := slow.hear(report)) is not None]


def test_a_slow_rank_is_named_once_with_host_and_phase_and_so_is_its_end() -> None:
    begun, over = found(*[report(i, 3, 3, 9, 3) for i in range(9)], *[report(i, 3, 3, 3, 3) for i in range(9, 15)])
    assert begun.what.startswith("Rank 2 on host-2 works 2.1 times as long as the others at each step")
    assert begun.what.endswith("it is slow in forward") and begun.rank == 2
    assert over.is_over and over.rank == 2 and "Rank 2 works as long as the others again" in over.what


def test_ranks_that_take_turns_and_one_that_is_slow_for_a_while_are_not_told() -> None:
    assert found(*[report(i, *(9 if rank == i % 3 else 3 for rank in range(3))) for i in range(30)]) == []
    assert found(*[report(i, 3, 9 if i < 3 else 3) for i in range(20)]) == []
    assert found(*[report(i, 3, 9, seconds=1.0) for i in range(20)]) == [], "20 s of it"


def test_a_little_slower_the_duties_of_the_first_rank_and_a_rank_alone_are_not_told() -> None:
    assert found(*[report(i, 3, 4.5) for i in range(20)]) == []
    duties = {"checkpoint": 50.0, "observers": 20.0, "evaluation": 9.0}
    assert found(*[report(i, 3, 3, **duties) for i in range(20)]) == []
    assert found(*[report(i, 9) for i in range(20)]) == []


def test_what_costs_nobody_time_is_not_told() -> None:
    assert found(*[report(i, 0.0, 5.0, seconds=100.0) for i in range(20)]) == []


def test_of_two_ranks_the_slower_is_named() -> None:
    (begun,) = found(*[report(i, 9, 3) for i in range(9)])
    assert begun.rank == 0
