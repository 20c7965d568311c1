"""A small recipe whose weights are there already, for the verbs that ask a model."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from feeding import read_job, write_job

from trainfleet.cli.main import main


def write_trained(folder: Path, **values: Any) -> tuple[Path, Path]:
    """(recipe, file of weights); its evaluation data are 21 rows, its training data 90."""
    path = write_job(folder, **values)
    settings = read_job(path)
    module, _, name = (settings.model.name or "").partition(":")
    sys.modules.pop(module, None)
    torch.manual_seed(1)
    torch.save(getattr(importlib.import_module(module), name)().state_dict(), folder / "weights.pt")
    return path, folder / "weights.pt"


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)
