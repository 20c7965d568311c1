"""Which checkpoint leads to a step, in a run that went back."""

from __future__ import annotations

from pathlib import Path

from trainfleet.events import AnomalySeen, Event, Restored, StepEnded
from trainfleet.monitor.jsonl import JsonLines
from trainfleet.training.replay.course import Course


def ended(step: int) -> StepEnded:
    return StepEnded(
        step=step,
        loss=float(step),
        learning_rate=0.1,
        grad_norm=1.0,
        samples=1,
        tokens=1,
        seconds=1.0,
        data_seconds=0.0,
    )


def course(path: Path, *rows: int | Event) -> Course:
    lines = JsonLines(path / "metrics.jsonl")
    for row in rows:
        lines.on_event(ended(row) if isinstance(row, int) else row)
    lines.close()
    return Course.of(path / "metrics.jsonl")


def back(failed: int, to: int) -> tuple[Event, Event]:
    seen = AnomalySeen(step=failed, kind="loss_not_finite", what="The loss is nan", policy="rollback")
    return seen, Restored(step=to, path="memory")


def test_a_straight_run_goes_on_from_any_checkpoint(tmp_path: Path) -> None:
    straight = course(tmp_path, 1, 2, 3, 4, 5)
    assert [step for step in range(6) if straight.leads(step, 4)] == [0, 1, 2, 3]
    assert straight.losses[3] == [3.0]
    assert Course.of(tmp_path / "none").leads(7, 8)


def test_a_checkpoint_behind_the_copy_that_a_rollback_went_to_does_not_lead_past_it(tmp_path: Path) -> None:
    went_back = course(tmp_path, 1, 2, 3, 4, *back(5, 3), 4, 5, 6)
    # Step 4 was saved anew after the rollback, and that is the state which leads to 6, but not to the first 5.
    assert [step for step in range(6) if went_back.leads(step, 6)] == [0, 1, 2, 3, 4, 5]
    assert [step for step in range(5) if went_back.leads(step, 5)] == [0, 1, 2, 3]
    assert went_back.losses[4] == [4.0, 4.0] and went_back.rolled_back == {5}
    far = course(tmp_path, 1, 2, 3, *back(4, 1), 5, 6)
    assert far.losses  # the file goes on
    lost = course(tmp_path / "other", 1, 2, 3, 4, *back(5, 2), 3, 6)
    assert not lost.leads(4, 6) and lost.leads(2, 6)
