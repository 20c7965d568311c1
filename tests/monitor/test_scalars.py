from __future__ import annotations

from typing import Any

from trainfleet.events import CheckpointSaved, Evaluated, Noted, RanksReported, Tracked
from trainfleet.monitor.scalars import scalars_in


def test_of_steps_each_nth_has_its_numbers(story: Any) -> None:
    assert scalars_in(story.step(9), every=10) is None
    step, numbers = scalars_in(story.step(10, loss=2.0, phases={"data": 0.5, "other": 0.0}, mfu=0.4), every=10) or (
        0,
        {},
    )
    known = {"train/loss": 2.0, "speed/tokens_per_second": 10240.0, "time/data_seconds": 0.5, "speed/mfu": 0.4}
    assert step == 10 and known.items() <= numbers.items() and "time/other_seconds" not in numbers


def test_evaluations_saves_and_own_numbers_have_theirs() -> None:
    assert scalars_in(Evaluated(step=1, loss=2.0, metrics={"f1": 0.5})) == (
        1,
        {"validation/loss": 2.0, "validation/f1": 0.5},
    )
    assert scalars_in(Tracked(step=2, name="mine/x", value=3.0)) == (2, {"mine/x": 3.0})
    assert scalars_in(CheckpointSaved(step=3, path="p", seconds=0.5)) == (3, {"time/save_seconds": 0.5})
    assert scalars_in(Noted(step=1, title="a", text="b")) is None


def test_machines_have_theirs_by_host_and_processes_by_rank() -> None:
    ranks = [{"host": "a", "system": {"cpu_percent": 1.0, "process_memory_bytes": 2.0}},
             {"host": "a", "system": {"process_memory_bytes": 3.0}}, {"host": "b"}]  # fmt: skip
    assert scalars_in(RanksReported(step=4, steps=2, ranks=ranks)) == (
        4,
        {
            "system/a/cpu_percent": 1.0,
            "system/a/rank0/process_memory_bytes": 2.0,
            "system/a/rank1/process_memory_bytes": 3.0,
        },
    )
    assert scalars_in(RanksReported(step=4, steps=2, ranks=ranks[:1])) == (
        4,
        {"system/a/cpu_percent": 1.0, "system/a/process_memory_bytes": 2.0},
    )
