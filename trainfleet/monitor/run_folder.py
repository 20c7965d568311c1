"""Where a run keeps what it writes.

runs/NAME/
  recipe.yaml        every setting as it was resolved
  environment.json   versions, machine and command, one entry a start
  metrics.jsonl      every event
  brief.json         the run in a line, once it was listed, where reading it again would take long
  metrics.csv        every number, where monitor.csv asks for it
  loss.png           the curve
  samples.txt        what the model generated
  memory.png         the memory of a step, where monitor.memory asks for it
  memory/            the report on it
  profile/           traces and operators, where monitor.profile asks for them
  tensorboard/
  checkpoints/
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from trainfleet.errors import StoreError
from trainfleet.store import HOLD, FileStore, Hold, replacing

PACKAGES = ("trainfleet", "torch", "numpy", "pydantic", "safetensors", "pyarrow", "transformers", "datasets")
"""Those whose versions can change what a run computes."""


class RunFolder:
    """The folder of one run; nothing is touched before `create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.brief = self.path / "brief.json"
        self.csv = self.path / "metrics.csv"
        self.curve = self.path / "loss.png"
        self.samples = self.path / "samples.txt"
        self.memory_picture = self.path / "memory.png"
        self.memory = self.path / "memory"
        self.profile = self.path / "profile"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"

    def create(self) -> None:
        """Make the folder if it is missing, and try whether files can be made in it."""
        trial = self.path / f".writable-{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            trial.write_bytes(b"")
            trial.unlink()
        except OSError as exc:
            raise StoreError(
                f"The run folder {self.path} cannot be written: {exc.strerror or exc}.",
                hint="Make it writable, or choose another folder for the run.",
            ) from exc

    def hold(self) -> Hold:
        """Take the folder for this run until that is closed; StoreError says whose it is already."""
        return FileStore(self.path).hold()

    def set_aside(self) -> Path | None:
        """Move what an earlier run left to `NAME.1`, `NAME.2`, ... and say where; None where there is nothing.

        Nothing is deleted, and the folder itself is gone until `create`.
        """
        if not self.path.is_dir() or all(path.name == HOLD for path in self.path.iterdir()):
            return None
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        try:
            self.path.rename(aside)
        except OSError as exc:
            raise StoreError(f"{self.path} cannot be moved to {aside}: {exc.strerror or exc}.") from exc
        return aside

    def write_recipe(self, text: str) -> None:
        """The resolved recipe, as YAML."""
        _replace(self.recipe, text)

    def write_environment(self, **more: Any) -> None:
        """Add an entry for this start; `more` is what the caller knows, such as devices and the world size."""
        try:
            entries = json.loads(self.environment.read_text())
        except (OSError, ValueError):  # the first start, or a file cut short by hand
            entries = []
        _replace(self.environment, json.dumps([*entries, describe_environment(**more)], indent=2) + "\n")


def describe_environment(**more: Any) -> dict[str, Any]:
    """What a person needs to run this again elsewhere; no environment variables, which may hold secrets."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "system": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": _versions(),
        **more,
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _replace(path: Path, text: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
