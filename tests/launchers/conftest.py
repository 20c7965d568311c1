"""The small job of `small_job.py`, and its losses under `trainfleet train --nproc 2` to compare with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from small_job import STEPS, Job, write_job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return write_job(tmp_path / "job")


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the same job, started by `trainfleet train --nproc 2`."""
    pytest.importorskip("torch", reason="the recipe is torch's")
    job = write_job(tmp_path_factory.mktemp("plain") / "job")
    job.run(["trainfleet", "train", "recipe.yaml", "--nproc", "2"])
    losses = job.losses()
    assert list(losses) == list(range(1, STEPS + 1))
    return losses
