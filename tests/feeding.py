"""A small job that is trained on data of this host or over the feed, and feeders of it in processes of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from trainfleet.config import load_config
from trainfleet.training.recipe import Recipe

MODULE = """
import numpy as np

class Points:
    def __init__(self, count=90, shift=0.0):
        self.x = np.random.default_rng(count).normal(size=(count, 4)).astype(np.float32) + np.float32(shift)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"input": self.x[index], "target": np.int64(self.x[index].argmax())}

def stream():
    return iter(Points())

def jitter(sample, rng):
    return {**sample, "input": sample["input"] + rng.normal(0, 0.1, 4).astype(np.float32)}

def net():
    from torch import nn
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 4))

def keep(model, mesh, folder):
    import torch
    numbers = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    if mesh.is_main:
        torch.save({name.replace("module.", ""): p.detach().clone() for name, p in numbers.items()}, folder / "end.pt")
    return {}
"""


def write_job(folder: Path, **values: Any) -> Path:
    """The recipe and its module in `folder`; `values` beat the recipe's, section by section."""
    name = f"fed_points_{os.getpid()}_{abs(hash(str(folder))) % 1000000}"
    (folder / f"{name}.py").write_text(MODULE)
    evaluation = {"source": f"{name}:Points", "args": {"count": 21}}
    base: dict[str, Any] = {
        "folder": str(folder / "run"),
        "model": {"name": f"{name}:net"},
        "data": {"source": f"{name}:Points", "transform": f"{name}:jitter", "evaluation": evaluation},
        "batch": {"global_batch": 8},
        "schedule": {"name": "constant"},
        "train": {"steps": 14, "evaluate_every": 7, "finish": f"{name}:keep"},
        "checkpoint": {"every": 7},
        "monitor": {"console": False, "tensorboard": False, "curve": False},
    }
    for section, inner in values.items():
        base[section] = {**base[section], **inner} if isinstance(inner, dict) and section in base else inner
    import yaml

    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


def read_job(path: Path, *overrides: str) -> Recipe:
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    return load_config(Recipe, file=path, overrides=overrides, env={}, dotenv=Path(os.devnull)).value


class FeederProcess:
    """`trainfleet feed`, or another verb that serves, with what it has said so far.

    Ended by `stop`, and by the end of a `with`.
    """

    def __init__(self, recipe: Path, *arguments: str, verb: str = "feed", env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainfleet.cli.main", verb, str(recipe), *arguments],
            cwd=recipe.parent,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.said = ""
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.said += line
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def find(self, pattern: str, seconds: float = 30) -> str:
        """The first group of what it says that matches."""
        with self._changed:
            self._changed.wait_for(lambda: re.search(pattern, self.said) or self.process.poll() is not None, seconds)
            found = re.search(pattern, self.said)
        assert found is not None, self.said
        return found[1]

    @property
    def reached_by(self) -> str:
        """What it told to give to --feed."""
        return self.find(r"--feed (\S+)\n")

    def stop(self, by: int = signal.SIGTERM) -> int:
        os.killpg(self.process.pid, by)
        code = self.process.wait(20)
        self._reader.join(5)
        return code

    def __enter__(self) -> FeederProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()
