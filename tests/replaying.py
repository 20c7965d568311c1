"""Small runs to replay steps of."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
from feeding import read_job, write_job

from trainfleet.training.feed import service_of
from trainfleet.training.job import Given, run

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
