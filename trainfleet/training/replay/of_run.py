"""Replay: one step of a run again, under inspection, from the newest checkpoint before it.

The steps in between are taken as the run took them: data, random numbers and rollbacks follow from the recipe and the
checkpoint. Everything that a run writes goes to a temporary folder; the run itself gets a report and nothing else.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainfleet.config import load_config
from trainfleet.data.config import REMOTE
from trainfleet.errors import ConfigError
from trainfleet.monitor import MonitorConfig, RunFolder
from trainfleet.training.feed import as_fed
from trainfleet.training.job import Given
from trainfleet.training.recipe import Recipe
from trainfleet.training.replay.again import Order, Tell, replay_rank
from trainfleet.training.replay.replayed import Replayed

logger = logging.getLogger(__name__)


def replay(
    run: str | Path,
    step: int,
    *,
    nproc: int | None = None,
    batch: str | Path | None = None,
    overrides: Sequence[str] = (),
    feeders: Sequence[str] = (),
    certificates: str | Path | None = None,
    given: Given | None = None,
    tell: Tell | None = None,
) -> Replayed:
    """Take step `step` of the run in a folder again, under inspection; its report is left in `replay/`.

    nproc      None: as many processes as the run had, all on this host
    batch      a file of micro-batches (`anomalies/step_…/batch.safetensors`) in place of that step's own, on the rank
               that its finding names, or the first
    overrides  of the recipe, such as data.args.path=…
    feeders    addresses or tokens of those that make the batches, for a run that was fed; `certificates` as with a feed
    given      what a program gave in place of the recipe's import paths

    ConfigError or DataError where it cannot be repeated, CheckpointError where no checkpoint is whole. Nothing else
    is written to the run, and it may go on meanwhile.
    """
    from trainfleet.training.ranks.launch import launch

    folder = RunFolder(run)
    given = given or Given()
    recipe = _recipe_of(folder, overrides, given, _ways(feeders, certificates))
    had = _world_size(folder)
    nproc = nproc or had or recipe.plan.fewest_ranks()
    order = Order(run=str(folder.path), step=step, batch=str(batch) if batch else None, had=had or nproc)
    with tempfile.TemporaryDirectory(prefix="trainfleet-replay-") as place:
        quiet = _quietly(recipe, folder, place)
        if nproc == 1:
            found = replay_rank(order, quiet, given, tell)
        else:
            found = launch(replay_rank, nproc, (order, quiet, given, tell))[0]
    _write(folder.path / "replay", found)
    return found


def _ways(feeders: Sequence[str], certificates: str | Path | None) -> dict[str, Any]:
    """To the feeders; none where there are none."""
    ways: dict[str, Any] = {"feeders": list(feeders)} if feeders else {}
    return ways | ({"certificates": str(certificates)} if certificates is not None else {})


def _recipe_of(folder: RunFolder, overrides: Sequence[str], given: Given, ways: Mapping[str, Any]) -> Recipe:
    if not folder.recipe.is_file():
        raise ConfigError(
            f"{folder.path} is no run: it has no {folder.recipe.name}.",
            hint="Give the folder that a run has written, such as runs/run.",
        )
    recipe = load_config(Recipe, file=folder.recipe, overrides=list(overrides)).value
    if ways:
        own = {key: value for key, value in recipe.data.args.items() if key not in ("feeders", "listen", "tunnel")}
        return as_fed(replace(recipe, data=replace(recipe.data, args=own)), **ways)
    if recipe.data.source == REMOTE and given.source is None:
        raise ConfigError(
            "The batches of this run came from feeders, of which its folder keeps no tokens.",
            hint="Give --feed with feeders of the same recipe, or name the data that they had, which gives the same "
            "batches: data.source=… data.args.path=…",
        )
    missing = [
        key
        for key, value, own in (
            ("model.name", recipe.model.name, given.model),
            ("data.source", recipe.data.source, given.source),
        )
        if value is None and own is None
    ]
    if missing:
        raise ConfigError(
            f"The recipe of this run has no {missing[0]}: a program gave it.",
            hint="Replay it from that program: trainfleet.training.replay.replay(run, step, given=Given(…)).",
        )
    return recipe


def _world_size(folder: RunFolder) -> int | None:
    """Of the run's last start."""
    try:
        return int(json.loads(folder.environment.read_text())[-1]["world_size"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def places_of_modules(run: str | Path) -> list[Path]:
    """Folders in which the run's own command found what its recipe names by import path."""
    try:
        command = json.loads(RunFolder(run).environment.read_text())[-1]["command"]
        given = [Path(str(each)) for each in command[1:]]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return []
    return [path if path.is_dir() else path.parent for path in given if path.is_dir() or path.suffix == ".yaml"]


def _quietly(recipe: Recipe, folder: RunFolder, place: str) -> Recipe:
    """The recipe of a run that computes the same, writes to `place` alone, and evaluates and saves nothing."""
    store = recipe.checkpoint.folder or str(folder.checkpoints)
    # What follows from the numbers is judged as it was; what follows from the clock would be judged anew.
    anomalies = replace(
        recipe.monitor.anomalies,
        dead_units=None,
        throughput_drop=None,
        slow_rank=None,
        data_starvation=None,
        stalled_step=None,
        disk_filling=None,
        memory_growth=None,
    )
    return replace(
        recipe,
        folder=f"{place}/run",
        checkpoint=replace(recipe.checkpoint, every=None, resume="never", folder=store),
        monitor=MonitorConfig(
            console=False,
            jsonl=False,
            tensorboard=False,
            curve=False,
            system=False,
            mfu=False,
            log_interval=recipe.monitor.log_interval,
            anomalies=anomalies,
        ),
        train=replace(recipe.train, evaluate_every=None, early_stopping=None, finish=None, observers=()),
    )


def _write(folder: Path, found: Replayed) -> None:
    name = f"step_{found.step:06d}"
    try:
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(found.to_plain(), indent=2) + "\n")
        (folder / f"{name}.txt").write_text("\n".join(found.lines()) + "\n")
    except OSError as error:
        logger.warning("The report could not be written to %s: %s.", folder, error.strerror or error)
