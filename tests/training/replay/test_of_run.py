"""A step that is taken again is the step that the run took, and its report is all that the run gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

import numpy as np
from feeding import read_job, write_job
from replaying import Points, files, finished, served

from trainfleet.errors import ConfigError, DataError
from trainfleet.training.feed import as_fed
from trainfleet.training.job import Given, run
from trainfleet.training.replay import replay


def test_a_step_between_checkpoints_has_its_loss_to_the_bit_and_nothing_else_is_written(tmp_path: Path) -> None:
    folder = finished(tmp_path, train={"steps": 10}, checkpoint={"every": 4})
    before = files(folder)
    told: list[str] = []
    found = replay(folder, 7, tell=told.append)
    assert found.began == 4 and "the run's loss, to the bit" in found.compared() and found.finding is None
    assert told[0] == "from the checkpoint of step 4: 2 steps are taken on the way" and len(told) == 3
    assert files(folder) == before
    report = json.loads((folder / "replay" / "step_000007.json").read_text())
    assert report["same_loss"] and [part["module"] for part in report["modules"]] == ["0", "1", "2", "3", ""]
    linear = report["modules"][3]
    assert linear["outputs"]["largest"] > 0 and linear["gradients"]["elements"] == linear["outputs"]["elements"] == 32
    assert 0 < linear["update_ratio"] < 0.1 and report["modules"][1]["outputs"]["zeros"] > 0  # dropout
    assert "Everything in it was finite." in (folder / "replay" / "step_000007.txt").read_text()
    assert "to the bit" in replay(folder, 2).compared()  # before the first checkpoint
    with pytest.raises(ConfigError, match="the run has steps 1 to 10"):
        replay(folder, 11)


def test_feeders_make_the_batches_of_a_fed_run_again(tmp_path: Path) -> None:
    path = write_job(tmp_path, train={"steps": 10}, checkpoint={"every": 4})
    recipe = read_job(path)
    with served(path) as service:
        run(as_fed(recipe, feeders=[str(service.address)]))
        with pytest.raises(ConfigError, match=r"came from feeders.*keeps no tokens"):
            replay(recipe.folder, 7)
    with served(path) as another:
        found = replay(recipe.folder, 7, feeders=[str(another.address)])
    assert found.began == 4 and "the run's loss, to the bit" in found.compared()


def test_what_cannot_be_repeated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run"):
        replay(tmp_path, 1)
    folder = finished(tmp_path, Given(source=Points()), train={"steps": 2}, checkpoint={"every": None})
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("source: fed_points", "source: remote #"))
    with pytest.raises(ConfigError, match="came from feeders"):
        replay(folder, 1)
    (folder / "recipe.yaml").write_text(text)
    once = Given(source=iter([{"input": np.ones(4, np.float32), "target": np.int64(1)}] * 99))
    with pytest.raises(DataError, match="are an iterator, which gives each sample once"):
        replay(folder, 1, given=once)
