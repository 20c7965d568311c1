"""What a recipe asks for watches its steps."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from trainfleet.config import load_config
from trainfleet.events import ANOMALIES
from trainfleet.mesh import Mesh
from trainfleet.monitor import RunFolder
from trainfleet.plan import Plan
from trainfleet.training.findings import Findings
from trainfleet.training.recipe import Recipe
from trainfleet.training.watching import watchers_of


def test_the_anomalies_of_the_recipe_are_watched_for(tmp_path: Path) -> None:
    off = {"monitor": {"anomalies": dict.fromkeys(ANOMALIES)}}
    with Mesh.from_env(Plan(), device="cpu") as mesh:
        assert len(watchers_of(Recipe(), mesh, RunFolder(tmp_path))) > 3
        (left,) = watchers_of(load_config(Recipe, values=off, env={}).value, mesh, RunFolder(tmp_path))
    assert isinstance(left, Findings)
