"""The wanted step is met as the run met it: rolled back, with a saved batch, by a step function."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from replaying import BAD, Points, finished

from trainfleet.training.job import Given
from trainfleet.training.replay import replay


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
