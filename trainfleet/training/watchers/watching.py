"""What looks at the steps of a recipe's run, on every rank."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from trainfleet.batch import Batch
from trainfleet.imports import load_object
from trainfleet.mesh import Mesh
from trainfleet.monitor import RunFolder
from trainfleet.monitor.anomalies import AnomalyConfig
from trainfleet.training.recipe import Recipe, TrainConfig
from trainfleet.training.watchers.anomalies import anomaly_watchers
from trainfleet.training.watchers.memory_watch import MemoryWatch
from trainfleet.training.watchers.profile_watch import ProfileWatch
from trainfleet.training.watchers.watcher import Watcher

if TYPE_CHECKING:
    from torch import nn

    from trainfleet.training.inspection import Inspector


def watchers_of(
    recipe: Recipe, mesh: Mesh, folder: RunFolder, *, model: nn.Module, batches: Iterable[Batch]
) -> list[Watcher]:
    """Those that the recipe asks for, in the order in which they are asked."""
    saves = recipe.checkpoint.folder or str(folder.checkpoints)
    inspector = inspector_of(recipe, folder.path, model, batches)
    watchers = watchers_for(
        recipe.train,
        mesh,
        inspector,
        anomalies=recipe.monitor.anomalies,
        folder=folder.path,
        saves=folder.path if "://" in saves else Path(saves),
    )
    return [*watchers, *_measuring(recipe, mesh, folder)]


def watchers_for(
    config: TrainConfig,
    mesh: Mesh,
    inspector: Inspector,
    *,
    anomalies: AnomalyConfig,
    folder: Path | None = None,
    saves: Path | None = None,
) -> list[Watcher]:
    """What watches for anomalies, of which `inspector` explains those that are no numbers."""
    rolls_back = config.rollback_every is not None
    found = anomaly_watchers(
        anomalies, mesh, rolls_back=rolls_back, folder=folder, saves=saves, explain=inspector.explain
    )
    return [inspector.before, inspector, *found]


def _measuring(recipe: Recipe, mesh: Mesh, folder: RunFolder) -> list[Watcher]:
    """They look at a step when the others have done with it."""
    watchers: list[Watcher] = []
    if (memory := recipe.monitor.memory_steps) is not None:
        watchers.append(MemoryWatch(memory.range, folder, mesh.world))
    if (profile := recipe.monitor.profile_steps) is not None:
        watchers.append(ProfileWatch(profile, folder, mesh.world))
    return watchers


def inspector_of(recipe: Recipe, folder: Path | None, model: nn.Module, batches: Iterable[Batch]) -> Inspector:
    """Explains the steps of the recipe's run that are not finite, and keeps what it finds in `folder`, if any."""
    from trainfleet.training.inspection import Inspector
    from trainfleet.training.watchers.before import Before

    step_fn = load_object(recipe.train.step_fn, key="train.step_fn") if recipe.train.step_fn else None
    before = Before(model, whole=recipe.monitor.anomalies.forgoes_updates)
    return Inspector(before, batches, clip_norm=recipe.train.clip_norm, folder=folder, step_fn=step_fn)
