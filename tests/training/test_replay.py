"""A step that is taken again is the step that the run took, and its report is all that the run gets."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import numpy as np
from feeding import read_job, write_job

from trainfleet.errors import ConfigError, DataError
from trainfleet.training.feed import as_fed, service_of
from trainfleet.training.job import Given, run
from trainfleet.training.replay import replay

BAD = 57


class Points:
    """Rows of which one, if it is wanted, holds NaN."""

    def __init__(self, bad: int | None = None) -> None:
        self.x = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
        self.y = self.x.argmax(1)
        if bad is not None:
            self.x[bad, 2] = math.nan

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": self.x[index], "target": self.y[index]}


def files(folder: Path) -> dict[str, str]:
    """Digests of all that is in a run, but for the reports."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "replay" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def served(path: Path) -> Any:
    return service_of(read_job(path, "data.workers=1"), address="127.0.0.1:0").open()


def finished(folder: Path, given: Given | None = None, **values: Any) -> Path:
    recipe = read_job(write_job(folder, **values))
    run(recipe, given)
    return Path(recipe.folder)


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


def test_what_was_not_finite_is_found_again_also_where_it_was_rolled_back(tmp_path: Path) -> None:
    given = Given(source=Points(BAD))
    train = {"steps": 14, "rollback_every": 3, "evaluate_every": None}
    folder = finished(tmp_path, given, train=train, checkpoint={"every": 4})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    step = next(row["step"] for row in rows if row["event"] == "AnomalySeen")
    found = replay(folder, step, given=given)
    assert found.finding is not None and found.finding.kind == "batch" and found.finding.indices == (BAD,)
    assert found.recorded is None and "rolled this step back when it first came to it" in found.remarks[0]
    # The steps behind it were taken with other batches, and are so again.
    later = replay(folder, 14, given=given)
    assert "to the bit" in later.compared()
    assert "to the bit" in replay(folder, step + 1, given=given).compared()


def test_a_saved_batch_takes_the_place_of_the_data(tmp_path: Path) -> None:
    import torch

    from trainfleet.training.inspection.evidence import write_batches

    folder = finished(tmp_path, train={"steps": 4}, checkpoint={"every": 2})
    batch = {"input": torch.full((8, 4), math.nan), "target": torch.zeros(8).long()}
    write_batches(tmp_path, [batch])
    found = replay(folder, 4, batch=tmp_path / "batch.safetensors")
    assert found.finding is not None and found.finding.kind == "batch" and math.isnan(found.loss)


def only_first(engine: Any, micro_batches: Any) -> Any:
    LEFT_OUT.append(any(math.isnan(value) for value in micro_batches[1]["input"].flatten().tolist()))
    return engine.forward_backward(micro_batches[:1])


LEFT_OUT: list[bool] = []
"""By call of `only_first`, whether what it left out holds NaN."""


def test_a_step_is_run_again_by_the_step_function_of_its_run(tmp_path: Path) -> None:
    given = Given(source=Points(4))  # in a second micro-batch
    train = {"steps": 11, "step_fn": f"{__name__}:only_first", "evaluate_every": None}
    LEFT_OUT.clear()
    folder = finished(tmp_path, given, train=train, batch={"global_batch": 8, "micro_batch": 4})
    step = LEFT_OUT.index(True) + 1
    found = replay(folder, step, given=given)
    assert found.finding is None and "to the bit" in found.compared()


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
