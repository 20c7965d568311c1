"""What looks at the steps of a recipe's run, on every rank."""

from __future__ import annotations

from trainfleet.mesh import Mesh
from trainfleet.monitor import RunFolder
from trainfleet.training.recipe import Recipe
from trainfleet.training.watcher import Watcher


def watchers_of(recipe: Recipe, mesh: Mesh, folder: RunFolder) -> list[Watcher]:
    """Those that the recipe asks for, in the order in which they are asked."""
    return []
