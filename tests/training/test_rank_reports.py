"""Each so many steps all ranks hear what each measured, and the numbers that were tracked."""

from __future__ import annotations

from typing import Any

from trainfleet.comm.group import Group
from trainfleet.comm.threads import run_ranks
from trainfleet.events import Event, RanksReported, StepEnded, Tracked
from trainfleet.tracks import Tracks
from trainfleet.training.rank_reports import RankReports


def ended(step: int, rank: int) -> StepEnded:
    return StepEnded(
        step=step,
        loss=1.0,
        learning_rate=0.1,
        grad_norm=1.0,
        samples=4,
        tokens=4,
        seconds=0.5,
        between_seconds=0.25,
        data_seconds=0.1,
        phases={"forward": 0.5 + rank, "other": 0.25, "data": 0.0},
        memory_bytes=100 * (rank + 1),
    )


def run(group: Group, steps: int, every: int) -> list[list[Event]]:
    tracks = Tracks()
    system = (lambda: {"cpu_percent": 50.0}) if group.rank == 0 else None
    reports = RankReports(group, tracks, every=every, device="cpu", system=system)
    told = []
    for step in range(1, steps + 1):
        tracks.step = step
        tracks.add("accuracy", step + group.rank)
        if group.rank == 1 and step == 2:
            tracks.add("only here", 9.0, reduce="max")
        told.append(reports.add(ended(step, group.rank)))
    return [*told, reports.finish()]


def test_a_report_is_the_same_on_all_ranks_and_covers_the_steps_since_the_last() -> None:
    first, second = run_ranks(2, lambda group: run(group, 5, 2))
    assert first == second
    assert [len(events) for events in first] == [0, 3, 0, 2, 0, 2]
    accuracy, only, report = first[1]
    assert accuracy == Tracked(step=2, name="accuracy", value=2.0)
    assert only == Tracked(step=2, name="only here", value=9.0)
    assert isinstance(report, RanksReported)
    assert (report.step, report.steps) == (2, 2)
    ranks: list[Any] = list(report.ranks)
    assert [rank["phases"] for rank in ranks] == [{"forward": 1.0, "other": 0.5}, {"forward": 3.0, "other": 0.5}]
    assert [rank["seconds"] for rank in ranks] == [1.5, 1.5]
    assert [rank["memory_bytes"] for rank in ranks] == [100, 200]
    assert [rank["system"] for rank in ranks] == [{"cpu_percent": 50.0}, {}]
    last = first[-1][-1]
    assert isinstance(last, RanksReported) and (last.step, last.steps) == (5, 1)


def test_nothing_is_reported_at_the_end_where_all_was_told() -> None:
    (told,) = run_ranks(1, lambda group: run(group, 4, 2))
    assert told[-1] == []
