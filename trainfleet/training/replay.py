"""Replay: one step of a run again, under inspection, from the newest checkpoint before it.

The steps in between are taken as the run took them: data, random numbers and rollbacks follow from the recipe and the
checkpoint. Everything that a run writes goes to a temporary folder; the run itself gets a report and nothing else.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainfleet.batch import Batch
from trainfleet.checkpoint import Checkpointer
from trainfleet.config import load_config
from trainfleet.data import IterableBatches
from trainfleet.data.config import REMOTE
from trainfleet.errors import CheckpointError, ConfigError, DataError
from trainfleet.events import StepEnded
from trainfleet.mesh import Mesh
from trainfleet.monitor import MonitorConfig, RunFolder
from trainfleet.store import open_store
from trainfleet.training.anatomy import Part, anatomy_of, before_update, gradients_now, table
from trainfleet.training.course import Course
from trainfleet.training.feed import as_fed
from trainfleet.training.inspection import Finding, Inspector
from trainfleet.training.inspection.evidence import FINDING, read_batches, read_finding
from trainfleet.training.inspection.finding import plain_number
from trainfleet.training.job import Given, prepared
from trainfleet.training.recipe import Recipe
from trainfleet.training.watcher import Judgement, UnderWay, Watcher
from trainfleet.training.watching import inspector_of

if TYPE_CHECKING:
    from trainfleet.training.trainer import Trainer

logger = logging.getLogger(__name__)

Tell = Callable[[str], None]
"""Gets a line for the person who waits."""


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A step, seen again."""

    step: int
    began: int
    """The step of the checkpoint that it went on from; 0 for none."""
    nproc: int
    loss: float
    grad_norm: float
    recorded: float | None
    """The loss that metrics.jsonl has for this step; None where it has none."""
    first_other: int | None
    """The first step on the way whose loss was not the recorded one; None where all were, or none is recorded."""
    parts: list[Part]
    finding: Finding | None
    remarks: tuple[str, ...] = field(default_factory=tuple)

    def lines(self) -> list[str]:
        """For a person."""
        begun = f"from the checkpoint of step {self.began}" if self.began else "from the begin of the run"
        processes = f"{self.nproc} process{'es' * (self.nproc != 1)}"
        lines = [f"step {self.step} again, {begun}, on {processes}", self.compared()]
        lines += [f"note: {remark}" for remark in self.remarks]
        lines += ["", *table(self.parts), ""]
        return [*lines, *(str(self.finding).splitlines() if self.finding else ["Everything in it was finite."])]

    def compared(self) -> str:
        """The loss beside that of the run."""
        line = f"loss {self.loss:.9g}, norm of the gradient {self.grad_norm:.6g}"
        if self.recorded is None:
            return f"{line}; the run has recorded no loss for it"
        if self.recorded == self.loss or (math.isnan(self.recorded) and math.isnan(self.loss)):
            return f"{line}; the run's loss, to the bit"
        way = "" if self.first_other is None else f"; the first step on the way to differ was {self.first_other}"
        off = abs(self.loss - self.recorded) / abs(self.recorded) if self.recorded else math.inf
        far = f", which is {off:.1e} off" if math.isfinite(off) else ""
        return f"{line}; the run's loss was {self.recorded:.9g}{far}{way}"

    def to_plain(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "began": self.began,
            "nproc": self.nproc,
            "loss": plain_number(self.loss),
            "grad_norm": plain_number(self.grad_norm),
            "recorded_loss": None if self.recorded is None else plain_number(self.recorded),
            "same_loss": "to the bit" in self.compared(),
            "first_other_step": self.first_other,
            "remarks": list(self.remarks),
            "finding": self.finding.to_plain() if self.finding else None,
            "modules": [part.to_plain() for part in self.parts],
        }


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
    from trainfleet.training.launch import launch

    folder = RunFolder(run)
    recipe = _recipe_of(folder, overrides, given or Given(), _ways(feeders, certificates))
    had = _world_size(folder)
    nproc = nproc or had or recipe.plan.fewest_ranks()
    order = _Order(run=str(folder.path), step=step, batch=str(batch) if batch else None, had=had or nproc)
    with tempfile.TemporaryDirectory(prefix="trainfleet-replay-") as place:
        quiet = _quietly(recipe, folder, place)
        given = given or Given()
        if nproc == 1:
            found = replay_rank(order, quiet, given, tell)
        else:
            found = launch(replay_rank, nproc, (order, quiet, given, tell))[0]
    _write(folder.path / "replay", found)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Order:
    run: str
    step: int
    batch: str | None
    had: int
    """Processes that the run had."""


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


class _Done(Exception):
    """The step has been seen; nothing more of the run is wanted."""


class _Replaying(Watcher):
    """Compares losses on the way, and inspects the step that is wanted before its update."""

    def __init__(self, order: _Order, course: Course, tell: Tell | None) -> None:
        self._order, self._course, self._tell = order, course, tell
        self.trainer: Trainer | None = None
        self.inspector: Inspector | None = None
        self.began = 0
        self.first_other: int | None = None
        self.found: Replayed | None = None

    def begin(self, step: int, micro_batches: Sequence[Batch]) -> None:
        if step != self._order.step:
            return
        assert self.inspector is not None and self.trainer is not None
        self.inspector.before.begin(step, micro_batches)
        if self._order.batch is None:
            return
        file = Path(self._order.batch)
        rank = read_finding(file.parent).rank if (file.parent / FINDING).is_file() else 0
        if rank >= self.trainer.mesh.world_size:
            raise DataError(f"{file} is of rank {rank}, but there are {self.trainer.mesh.world_size}. Give --nproc.")
        if rank == self.trainer.mesh.world.rank:
            assert isinstance(micro_batches, list)
            micro_batches[:] = read_batches(file, micro_batches)

    def judge(self, under_way: UnderWay) -> Judgement | None:
        if under_way.step == self._order.step:
            self.found = self._seen(under_way)
            raise _Done
        return None

    def end(self, ended: StepEnded) -> None:
        if self.first_other is None and not _holds(self._course.losses.get(ended.step), ended.loss):
            self.first_other = ended.step
        if self._tell is not None and ended.step < self._order.step:
            self._tell(f"step {ended.step} of {self._order.step}: loss {ended.loss:.6g}")

    def _seen(self, under_way: UnderWay) -> Replayed:
        assert self.inspector is not None and self.trainer is not None
        model, mesh = self.trainer.model, self.trainer.mesh
        finding, watch = self.inspector.inspect(under_way, tallies=True)
        remarks = []
        if under_way.loss_scale is not None and finding is not None and math.isfinite(under_way.loss):
            finding = None
            remarks.append(
                f"Gradients overflowed at the loss scale {under_way.loss_scale:g}, which is no anomaly: the step is "
                "skipped, and the scale halves."
            )
        before, gradients = before_update(model), gradients_now(model)
        under_way.engine.step()
        parts = anatomy_of(model, watch, before, gradients, mesh.world)
        losses = self._course.losses.get(under_way.step)
        if under_way.step in self._course.rolled_back:
            losses = None
            remarks.append(
                "The run rolled this step back when it first came to it, which is what is seen here; under this number "
                "it later took other batches."
            )
        same = [loss for loss in losses or () if _holds([loss], under_way.loss)]
        if losses and len(losses) > 1:
            remarks.append(f"The run took this step {len(losses)} times; this is as it came to it first.")
        if self._order.had != mesh.world_size:
            remarks.append(
                f"The run had {self._order.had} processes; sums are rounded in another order on {mesh.world_size}."
            )
        return Replayed(
            step=under_way.step,
            began=self.began,
            nproc=mesh.world_size,
            loss=under_way.loss,
            grad_norm=under_way.grad_norm,
            recorded=next(iter(same or losses or ()), None),
            first_other=self.first_other,
            parts=parts,
            finding=finding,
            remarks=tuple(remarks),
        )


def replay_rank(order: _Order, recipe: Recipe, given: Given, tell: Tell | None) -> Replayed:
    """As one rank; the same on each, but for what is told, which is the first one's business."""
    with Mesh.from_env(recipe.plan) as mesh:
        course = Course.of(RunFolder(order.run).metrics)
        replaying = _Replaying(order, course, tell if mesh.is_main else None)
        with prepared(recipe, mesh, replace(given, watchers=(replaying,))) as trainer:
            _refuse(order, trainer)
            replaying.trainer = trainer
            replaying.inspector = inspector_of(recipe, None, trainer.model, trainer.batches)
            replaying.began = _restored(order, recipe, trainer, course)
            if tell is not None and mesh.is_main:
                count = order.step - replaying.began - 1
                on_the_way = f"{count} steps are taken on the way" if count else "it is the next step"
                begun = f"the checkpoint of step {replaying.began}" if replaying.began else "the begin of the run"
                tell(f"from {begun}: {on_the_way}")
            with suppress(_Done):
                trainer.fit()
            if replaying.found is None:
                raise ConfigError(f"The run ended before step {order.step}, at step {trainer.step}.")
            return replaying.found


def _refuse(order: _Order, trainer: Trainer) -> None:
    if not 1 <= order.step <= trainer.steps:
        raise ConfigError(f"--step is {order.step}; the run has steps 1 to {trainer.steps}.")
    if isinstance(trainer.batches, IterableBatches) and not trainer.batches.can_begin_again:
        raise DataError(
            "The data of this run are an iterator, which gives each sample once: what the step was trained on cannot "
            "be had again.",
            hint="Give data.source a class with __iter__.",
        )


def _restored(order: _Order, recipe: Recipe, trainer: Trainer, course: Course) -> int:
    """The step of the newest whole checkpoint that leads to the wanted one, which `trainer` has afterwards; 0: none."""
    assert recipe.checkpoint.folder is not None
    store = open_store(recipe.checkpoint.folder)
    with Checkpointer(store, group=trainer.mesh.world) as checkpointer:
        found = [step for step in checkpointer.steps() if course.leads(step, order.step)]
        steps = trainer.mesh.world.exchange(sorted(found, reverse=True))[0]
        problem: CheckpointError | None = None
        for step in steps:
            try:
                checkpointer.restore(step, partial=True, cast=recipe.checkpoint.cast, **trainer.all_states())
            except CheckpointError as error:
                problem = error
                logger.warning("%s", error)
            else:
                return int(step)
        if problem is not None and len(steps) == 1:
            raise problem
    return 0


def _holds(recorded: Sequence[float] | None, loss: float) -> bool:
    """Whether `loss` is one of them, or there are none."""
    return not recorded or any(each == loss or (each != each and loss != loss) for each in recorded)


def _write(folder: Path, found: Replayed) -> None:
    name = f"step_{found.step:06d}"
    try:
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(found.to_plain(), indent=2) + "\n")
        (folder / f"{name}.txt").write_text("\n".join(found.lines()) + "\n")
    except OSError as error:
        logger.warning("The report could not be written to %s: %s.", folder, error.strerror or error)
