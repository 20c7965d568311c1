from __future__ import annotations

from typing import Any

from trainfleet.monitor.history.ranks import Ranks


def report(host: str, **phases: float) -> dict[str, Any]:
    known = {"data": 1.0, "forward": 2.0, "backward": 4.0, "communication": 3.0}
    phases = {**known, **phases}
    return {"host": host, "device": "cpu", "seconds": sum(phases.values()), "phases": phases, "memory_bytes": 5}


def test_the_slow_rank_is_named_with_the_phase_that_is_slow() -> None:
    ranks = Ranks()
    for _ in range(3):
        ranks.add([report("a"), report("b", data=5.0, communication=0.0), report("c"), report("d", forward=2.1)])
    (slow,) = ranks.slow
    assert (slow.rank, slow.host, slow.phase) == (1, "b", "data") and 1.5 < slow.factor < 1.6


def test_of_two_ranks_the_one_that_waits_is_not_slow() -> None:
    ranks = Ranks()
    ranks.add([report("a", communication=8.0), report("b", backward=8.0, communication=0.0)])
    assert [(slow.rank, slow.phase) for slow in ranks.slow] == [(1, "backward")]


def test_reports_add_up_and_keep_the_most_memory() -> None:
    ranks = Ranks()
    ranks.add([{**report("a"), "memory_bytes": 9}])
    ranks.add([report("a"), report("b")])
    assert [rank.memory_bytes for rank in ranks.ranks] == [9, 5]
    assert ranks.ranks[0].phases["backward"] == 8.0 and ranks.ranks[1].phases["backward"] == 4.0


def test_what_is_no_report_is_left_out() -> None:
    ranks = Ranks()
    for odd in (None, "ranks", [1, None], [{"phases": 3, "seconds": "x", "system": []}]):
        ranks.add(odd)
    assert len(ranks.ranks) == 1 and ranks.slow == []
