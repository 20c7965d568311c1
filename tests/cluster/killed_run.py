"""A small run that depends on everything a checkpoint has to bring back, and how two such runs are compared."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from trainfleet.checkpoint.manifest import read_indexes, read_manifest
from trainfleet.checkpoint.whole import whole_states
from trainfleet.monitor import read_metrics
from trainfleet.store import FileStore

STEPS = 120

RECIPE = f"""
folder: run
model: {{name: 'learner:Learner'}}
data: {{source: 'learner:Numbers', workers: 1}}
batch: {{micro_batch: 2, accumulation: 2}}
plan: {{zero: 2}}
loss: mse
train: {{steps: {STEPS}, ema_decay: 0.9}}
checkpoint: {{every: 2, keep_last: 2}}
monitor: {{tensorboard: false, curve: false, console: false}}
"""

MODULE = """
import random
import numpy as np
import torch
from torch import nn

class Learner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x):
        # Random numbers that no seed of the step makes: a resume has to bring the generators back.
        noise = random.random() + np.random.random()
        return self.layers(x + 0.01 * noise)

class Numbers:
    def __len__(self):
        return 100
    def __getitem__(self, index):
        x = torch.full((4,), index / 100)
        return {"input": x, "label": x.sum(0, keepdim=True)}
"""


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The ranks that `trainfleet train` has started, in order; they bear their number as name."""
    children = psutil.Process(launcher).children()
    return sorted((each for each in children if each.name().startswith("rank ")), key=psutil.Process.name)


def write_job(folder: Path, recipe: str = RECIPE) -> None:
    """recipe.yaml, and the module that it names."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "learner.py").write_text(MODULE)


def states_at(folder: Path, step: int) -> dict[str, Any]:
    store = FileStore(folder / "run" / "checkpoints")
    return whole_states(store, read_indexes(store, read_manifest(store, step)))


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, with types."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "numpy"):
        a, b = a.numpy(), b.numpy()
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    return type(a) is type(b) and bool(a == b)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder / "run" / "metrics.jsonl")]


def await_step(job: Path, step: int) -> None:
    ends = time.monotonic() + 90
    while not any(int(path.name[5:]) >= step for path in (job / "run" / "checkpoints").glob("step-*")):
        assert time.monotonic() < ends, "the run does not come so far"
        time.sleep(0.01)
