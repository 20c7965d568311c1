"""What a recipe asks for watches its steps."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from torch import nn

from trainfleet.config import load_config
from trainfleet.events import ANOMALIES
from trainfleet.mesh import Mesh
from trainfleet.monitor import RunFolder
from trainfleet.plan import Plan
from trainfleet.training.inspection import Inspector
from trainfleet.training.recipe import Recipe
from trainfleet.training.watchers.findings import Findings
from trainfleet.training.watchers.not_finite import NotFinite
from trainfleet.training.watchers.watcher import Watcher
from trainfleet.training.watchers.watching import watchers_of


def watching(recipe: Recipe, folder: Path) -> list[Watcher]:
    with Mesh.from_env(Plan(), device="cpu") as mesh:
        return watchers_of(recipe, mesh, RunFolder(folder), model=nn.Linear(2, 2), batches=[])


def test_the_anomalies_of_the_recipe_are_watched_for(tmp_path: Path) -> None:
    off = {"monitor": {"anomalies": dict.fromkeys(ANOMALIES)}}
    assert len(watching(Recipe(), tmp_path)) > 4
    _, _, left = watching(load_config(Recipe, values=off, env={}).value, tmp_path)
    assert isinstance(left, Findings)


def test_what_is_not_finite_is_explained(tmp_path: Path) -> None:
    before, inspector, *others = watching(Recipe(), tmp_path)
    assert isinstance(inspector, Inspector) and inspector.before is before, "remembered before it is looked at"
    (judge,) = [each for each in others if isinstance(each, NotFinite)]
    assert judge._explain == inspector.explain
