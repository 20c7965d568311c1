"""A dry run says what would be trained, and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from trainfleet.config import load_config
from trainfleet.errors import PlanError
from trainfleet.training.dry_run import check
from trainfleet.training.recipe import Recipe


class Numbers:
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return [float(index)] * 3, index % 2


def recipe(folder: Path, **sections: Any) -> Recipe:
    values = {
        "model": {"name": "torch.nn:Linear", "args": {"in_features": 3, "out_features": 2}},
        "data": {"source": f"{__name__}:Numbers"},
        "batch": {"micro_batch": 4},
        "folder": str(folder),
        **sections,
    }
    return load_config(Recipe, values=values, env={}).value


def test_it_says_what_would_be_trained_and_writes_nothing(tmp_path: Path) -> None:
    lines = "\n".join(check(recipe(tmp_path / "run", plan={"zero": 2}), 4))
    assert "zero=2 dp_replicate=1 dp_shard=4" in lines
    assert "8 parameters" in lines
    assert "64 samples" in lines
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="does not divide the 4 samples"):
        check(recipe(tmp_path, plan={"pp": 2, "microbatches": 3}), 2)
