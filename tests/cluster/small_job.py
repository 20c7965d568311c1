"""A very small job that every launcher trains, in a folder of its own."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
STEPS = 6
RECIPE = f"""
folder: run
model: {{name: 'learner:Learner'}}
data: {{source: 'learner:Numbers'}}
batch: {{micro_batch: 2}}
plan: {{zero: 2}}
loss: mse
train: {{steps: {STEPS}}}
checkpoint: {{every: 3}}
monitor: {{tensorboard: false, curve: false, console: false}}
"""
MODULE = """
import os
import pathlib
import torch
from torch import nn

class Learner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 1))
        pathlib.Path(f"threads.{os.getpid()}").write_text(str(torch.get_num_threads()))

    def forward(self, x):
        return self.layers(x)

class Numbers:
    def __len__(self):
        return 100
    def __getitem__(self, index):
        x = torch.full((4,), index / 100)
        return {"input": x, "label": x.sum(0, keepdim=True)}

class Slow(Numbers):
    def __getitem__(self, index):
        import time
        time.sleep(0.05)
        return super().__getitem__(index)

class Breaks(Numbers):
    def __getitem__(self, index):
        if index == 13:
            raise ValueError("sample 13 is rotten")
        return super().__getitem__(index)
"""
FOREIGN = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "SLURM_", "PMI", "MPI_", "OMPI_", "OMP_", "TORCHELASTIC", "RAY_")
"""How names of variables begin that a launcher around the tests may have set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A folder with a recipe, its module, and what became of them."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def start(self, command: list[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command in the folder; `trainfleet` and `mpiexec` are those beside this Python."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**self.env, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: list[str], env: Mapping[str, str] | None = None, seconds: int = 90) -> str:
        """What a command said that ended well."""
        done = self.start(command, env)
        try:
            said, _ = done.communicate(timeout=seconds)
        finally:
            done.kill()
        assert done.returncode == 0, said
        return said

    def losses(self) -> dict[int, float]:
        """Loss by step."""
        from trainfleet.monitor import read_metrics

        return {row["step"]: row["loss"] for row in read_metrics(self.folder / "run" / "metrics.jsonl")}

    def threads(self) -> list[int]:
        """Of each rank that built the model."""
        return [int(path.read_text()) for path in self.folder.glob("threads.*")]


def write_job(folder: Path, **changes: str) -> Job:
    folder.mkdir(exist_ok=True)
    recipe = RECIPE
    for old, new in changes.items():
        assert old in recipe
        recipe = recipe.replace(old, new)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "learner.py").write_text(MODULE)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return Job(folder=folder, env={**clean, "PATH": f"{BIN}:{os.environ['PATH']}"})


@functools.cache
def plain_losses() -> dict[int, float]:
    """The losses of the same job, started by `trainfleet train --nproc 2`; once in a session."""
    pytest.importorskip("torch", reason="the recipe is torch's")
    with tempfile.TemporaryDirectory() as place:
        job = write_job(Path(place) / "job")
        job.run(["trainfleet", "train", "recipe.yaml", "--nproc", "2"])
        losses = job.losses()
    assert list(losses) == list(range(1, STEPS + 1))
    return losses
