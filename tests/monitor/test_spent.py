from __future__ import annotations

from typing import Any

import pytest

from trainfleet.events import Evaluated, Restored, RunEnded
from trainfleet.monitor.history import read_run
from trainfleet.monitor.jsonl import JsonLines
from trainfleet.monitor.progress import Progress
from trainfleet.monitor.spent import Spent

PHASES = {"data": 0.01, "forward": 0.03, "backward": 0.05, "optimizer": 0.01}


def test_undone_steps_were_spent_and_count_for_nothing(story: Any) -> None:
    spent = Spent(story.started(start_step=10))
    for step in (11, 12, 13):
        spent.step(story.step(step, phases=PHASES))
    assert spent.goodput(0.5) == pytest.approx(0.27 / 0.5)
    spent.restore(Restored(step=11, path="memory"))
    assert spent.goodput(0.5) == pytest.approx(0.09 / 0.5)
    assert spent.percentages(0.5) == {
        "data": 6, "forward": 18, "backward": 30, "optimizer": 6, "outside steps": 40,
    }  # fmt: skip
    spent.restore(Restored(step=0, path="elsewhere"))
    assert spent.goodput(0.5) == 0.0


def test_an_evaluation_after_the_last_step_counts_once(story: Any) -> None:
    spent = Spent(story.started())
    spent.step(story.step(1, phases=PHASES))
    spent.evaluate(Evaluated(step=1, loss=1.0, seconds=0.1))
    assert spent.percentages(0.2)["evaluation"] == 50
    spent.step(story.step(2, phases={**PHASES, "evaluation": 0.1}))
    assert spent.percentages(0.3)["evaluation"] in (33, 34)


def test_the_end_of_a_run_says_where_the_time_went_and_its_goodput(story: Any) -> None:
    progress = Progress()
    progress.start(story.started())
    for step in range(1, 11):
        progress.step(story.step(step, phases=PHASES, data_seconds=0.01))
    summary = progress.summary(RunEnded(step=10, reason="finished", seconds=2.0, summary={"score": 1.0}))
    assert list(summary) == ["score", "time", "waits for data", "goodput", "limit"]
    assert summary["time"] == "50% outside steps, 25% backward, 15% forward, 5% data, 5% optimizer"
    assert summary["goodput"] == "45% since this start"
    assert summary["waits for data"] == "10% data of the time in steps"
    assert str(summary["limit"]).startswith("The batches are the limit")


def test_it_is_the_goodput_that_the_file_gives_of_a_run_of_one_start(tmp_path: Any, story: Any) -> None:
    progress, log = Progress(), JsonLines(tmp_path / "metrics.jsonl")
    progress.start(story.started())
    log.on_event(story.started())
    for step in range(1, 4):
        progress.step(story.step(step, phases=PHASES))
        log.on_event(story.step(step, phases=PHASES))
    goodput = read_run(tmp_path).goodput
    assert progress.spent.goodput(goodput.seconds) == pytest.approx(goodput.share)
