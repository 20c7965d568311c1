"""Again: a step of a run taken anew on one rank, from the newest checkpoint that leads to it, under inspection."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainfleet.batch import Batch
from trainfleet.checkpoint import Checkpointer
from trainfleet.data import IterableBatches
from trainfleet.errors import CheckpointError, ConfigError, DataError
from trainfleet.events import StepEnded
from trainfleet.mesh import Mesh
from trainfleet.monitor import RunFolder
from trainfleet.store import open_store
from trainfleet.training.inspection import Inspector
from trainfleet.training.inspection.evidence import FINDING, read_batches, read_finding
from trainfleet.training.job import Given, prepared
from trainfleet.training.recipe import Recipe
from trainfleet.training.replay.anatomy import anatomy_of, before_update, gradients_now
from trainfleet.training.replay.course import Course
from trainfleet.training.replay.replayed import Replayed
from trainfleet.training.watchers.watcher import Judgement, UnderWay, Watcher
from trainfleet.training.watchers.watching import inspector_of

if TYPE_CHECKING:
    from trainfleet.training.trainer import Trainer

logger = logging.getLogger(__name__)

Tell = Callable[[str], None]
"""Gets a line for the person who waits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What is wanted of a rank."""

    run: str
    step: int
    batch: str | None
    had: int
    """Processes that the run had."""


class _Done(Exception):
    """The step has been seen; nothing more of the run is wanted."""


class _Replaying(Watcher):
    """Compares losses on the way, and inspects the step that is wanted before its update."""

    def __init__(self, order: Order, course: Course, tell: Tell | None) -> None:
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


def replay_rank(order: Order, recipe: Recipe, given: Given, tell: Tell | None) -> Replayed:
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


def _refuse(order: Order, trainer: Trainer) -> None:
    if not 1 <= order.step <= trainer.steps:
        raise ConfigError(f"--step is {order.step}; the run has steps 1 to {trainer.steps}.")
    if isinstance(trainer.batches, IterableBatches) and not trainer.batches.can_begin_again:
        raise DataError(
            "The data of this run are an iterator, which gives each sample once: what the step was trained on cannot "
            "be had again.",
            hint="Give data.source a class with __iter__.",
        )


def _restored(order: Order, recipe: Recipe, trainer: Trainer, course: Course) -> int:
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
