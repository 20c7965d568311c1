"""What looks at the steps of a recipe's run, on every rank."""

from __future__ import annotations

from pathlib import Path

from trainfleet.mesh import Mesh
from trainfleet.monitor import RunFolder
from trainfleet.training.anomalies import anomaly_watchers
from trainfleet.training.recipe import Recipe
from trainfleet.training.watcher import Watcher


def watchers_of(recipe: Recipe, mesh: Mesh, folder: RunFolder) -> list[Watcher]:
    """Those that the recipe asks for, in the order in which they are asked."""
    saves = recipe.checkpoint.folder or str(folder.checkpoints)
    return anomaly_watchers(
        recipe.monitor.anomalies,
        mesh,
        rolls_back=recipe.train.rollback_every is not None,
        folder=folder.path,
        saves=folder.path if "://" in saves else Path(saves),
    )
