"""The small job that every launcher trains, and its losses without one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_job import Job, plain_losses, write_job

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return write_job(tmp_path / "job")


@pytest.fixture(scope="session")
def plain() -> dict[int, float]:
    """The losses under `trainfleet train --nproc 2`."""
    return plain_losses()
