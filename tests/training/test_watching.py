"""A recipe that asks for nothing has its steps looked at by nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from trainfleet.mesh import Mesh
from trainfleet.monitor import RunFolder
from trainfleet.plan import Plan
from trainfleet.training.recipe import Recipe
from trainfleet.training.watching import watchers_of


def test_nobody_watches_unasked(tmp_path: Path) -> None:
    with Mesh.from_env(Plan(), device="cpu") as mesh:
        assert watchers_of(Recipe(), mesh, RunFolder(tmp_path)) == []
