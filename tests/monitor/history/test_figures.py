from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainfleet.events import Event
from trainfleet.monitor.history import compare, differing, figures, read_run
from trainfleet.monitor.history.figures import ABSENT, flattened
from trainfleet.monitor.jsonl import JsonLines
from trainfleet.monitor.run_folder import RunFolder


def write(folder: Path, recipe: str, *events: Event) -> Path:
    folder.mkdir()
    RunFolder(folder).write_recipe(recipe)
    log = JsonLines(folder / "metrics.jsonl")
    for event in events:
        log.on_event(event)
    log.close()
    return folder


def test_figures_are_those_of_the_run(tmp_path: Path, story: Any) -> None:
    found = figures(read_run(write(tmp_path / "a", "{}\n", *story.run())))
    assert (found["end"], found["steps"], found["planned_steps"], found["starts"]) == ("finished", 40, 40, 1)
    assert found["validation_loss"] == found["best_validation_loss"] == pytest.approx(1.6733, abs=1e-4)
    assert (found["tokens_per_second"], found["samples_per_second"]) == (pytest.approx(10_240), pytest.approx(80))
    assert found["data_wait_share"] == pytest.approx(0.01) and found["peak_memory_bytes"] == 412_000_000


def test_figures_of_a_run_without_a_step_are_not_known(tmp_path: Path) -> None:
    found = figures(read_run(_empty(tmp_path)))
    assert found["steps"] == 0 and {name for name, value in found.items() if value is None} >= {
        "loss", "validation_loss", "tokens_per_second", "goodput", "peak_memory_bytes", "mfu",
    }  # fmt: skip


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").touch()
    return tmp_path


def test_settings_that_differ_come_with_dotted_names() -> None:
    one = {"train": {"seed": 0, "steps": 5}, "model": {"args": {"width": 4}}, "folder": "a"}
    other = {"train": {"seed": 0, "steps": 9}, "model": {"args": {}}, "folder": "b"}
    assert differing([one, other]) == {
        "train.steps": [5, 9], "model.args.width": [4, ABSENT], "model.args": [ABSENT, {}],
    }  # fmt: skip
    assert differing([one, one]) == {} and flattened({}) == {}


def test_losses_are_told_at_equal_steps_and_at_equal_time(tmp_path: Path, story: Any) -> None:
    slow = [story.started(), *[story.step(n, loss=1.0 * n, seconds=0.2) for n in range(1, 21)]]
    fast = [story.started(), *[story.step(n, loss=10.0 * n, seconds=0.1) for n in range(1, 41)]]
    found = compare([
        read_run(write(tmp_path / "slow", "train: {seed: 1}\n", *slow)),
        read_run(write(tmp_path / "fast", "train: {seed: 2}\n", *fast)),
    ])  # fmt: skip
    assert found.settings == {"train.seed": [1, 2]} and len(found.figures) == 2
    assert [(m.at, m.losses) for m in found.at_equal_steps] == [
        (5, [5.0, 50.0]), (10, [10.0, 100.0]), (15, [15.0, 150.0]), (20, [20.0, 200.0]),
    ]  # fmt: skip
    last = found.at_equal_time[-1]
    assert last.at == pytest.approx(4.0) and last.steps == [20, 40] and last.losses == [20.0, pytest.approx(395.0)]


def test_a_run_that_has_not_begun_can_be_compared(tmp_path: Path, story: Any) -> None:
    begun = read_run(write(tmp_path / "a", "{}\n", *story.run()))
    found = compare([begun, read_run(_empty(tmp_path))])
    assert found.at_equal_steps == found.at_equal_time == []
