"""A job: from a recipe to a trained model, on this rank. The one place where the capabilities are joined."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trainfleet.batch import Batch
from trainfleet.checkpoint import Checkpointer
from trainfleet.comm.environment import RankEnvironment
from trainfleet.config import to_plain, to_yaml
from trainfleet.errors import AnomalyStopped, CheckpointError, ConfigError, FailedTwice, PeerError, StoreError
from trainfleet.events import Observer, SamplesSkipped
from trainfleet.imports import load_object
from trainfleet.mesh import Mesh
from trainfleet.monitor import RunFolder, observers_for, system_numbers
from trainfleet.plan import Plan
from trainfleet.store import open_store
from trainfleet.training.deepspeed_file import with_deepspeed_file
from trainfleet.training.feed import refuse_unlike_feeders, without_tokens
from trainfleet.training.losses import loss_by_name
from trainfleet.training.outcome import Outcome
from trainfleet.training.ranks.failure import MEND, leave_report
from trainfleet.training.ranks.progress import Progress
from trainfleet.training.recipe import Recipe
from trainfleet.training.utilisation import open_utilisation
from trainfleet.training.watchers.watching import watchers_of

if TYPE_CHECKING:
    from torch import nn

    from trainfleet.training.trainer import Trainer
    from trainfleet.training.watchers.watcher import Watcher

logger = logging.getLogger(__name__)

_AFTER_A_LOSS = timedelta(seconds=0.5)
"""For a save under way when a peer is lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What a Python program gives in place of the recipe's import paths."""

    model: nn.Module | Callable[[], nn.Module] | None = None
    source: Any = None
    evaluation_source: Any = None
    loss_fn: Callable[[Any, Batch], Any] | None = None
    observers: Sequence[Observer] = field(default_factory=tuple)
    watchers: Sequence[Watcher] = field(default_factory=tuple)
    """Asked before those of the recipe."""


def run(recipe: Recipe, given: Given | None = None) -> Outcome:
    """Train as `recipe` says on the ranks that a launcher started, or on this process alone.

    A run that has taken all its steps already is left as it is: the outcome's reason is `finished before`.
    """
    recipe = with_deepspeed_file(as_restarted(recipe, RankEnvironment.from_env().restart))
    patience = timedelta(seconds=recipe.train.timeout_seconds)
    with Mesh.from_env(recipe.plan, timeout=patience) as mesh, prepared(recipe, mesh, given or Given()) as trainer:
        if trainer.step >= trainer.steps:
            logger.info(
                "The run in %s has taken its %d steps. Raise train.steps to go on, or start anew with --resume never.",
                recipe.folder,
                trainer.step,
            )
            return Outcome(step=trainer.step, reason="finished before", loss=None, evaluation=None)
        retries = recipe.train.max_retries if mesh.world_size == 1 and recipe.checkpoint.every else 0
        return _fit(trainer, retries=retries, folder=Path(recipe.folder))


def _fit(trainer: Trainer, *, retries: int, folder: Path) -> Outcome:
    """Train; after an error go on from the newest checkpoint, unless the same came at the same step before."""
    last: str | None = None
    while True:
        try:
            return trainer.fit()
        except AnomalyStopped:
            raise
        except Exception as exc:
            met = f"{type(exc).__name__} after step {trainer.step}: {exc}"
            if met == last:
                error = FailedTwice(
                    f"The run failed twice in the same way, so it was not tried again: {met}", hint=MEND
                )
                if report := leave_report(folder, error, exc):
                    error.hint = f"{MEND} The report is in {report}."
                raise error from exc
            if retries == 0:
                raise
            retries, last = retries - 1, met
            logger.warning("%s. The run goes on from its newest checkpoint; %d retries are left.", met, retries)
            if trainer.restore() is None:
                raise


def as_restarted(recipe: Recipe, restarts: int) -> Recipe:
    """What ranks do that were started anew after a failure: go on, even where the first start was to begin."""
    if restarts and recipe.checkpoint.resume == "never":
        return replace(recipe, checkpoint=replace(recipe.checkpoint, resume="auto"))
    return recipe


@contextmanager
def prepared(recipe: Recipe, mesh: Mesh, given: Given) -> Iterator[Trainer]:
    """A Trainer with everything the recipe names, restored where the recipe wants that; closed afterwards."""
    from trainfleet.parallel import parallelize
    from trainfleet.parallel.optimizers import build_optimizer
    from trainfleet.parallel.randomness import seed_generators
    from trainfleet.training.trainer import Trainer

    micro, accumulation, whole = recipe.batch.resolve(mesh.data_axes.size)
    refuse_schedule(recipe.plan, accumulation)
    with ExitStack() as closing:
        folder = open_run_folder(recipe, mesh, closing)
        metadata = {"recipe": to_plain(without_tokens(recipe))}
        observers = [*observers_for(recipe.monitor, folder, mesh.is_main), *_told_to_the_launcher(), *given.observers]
        observers += [load_object(path, key="train.observers")() for path in recipe.train.observers]

        seed_generators(recipe.train.seed, mesh.data_axes.rank)
        prepare = recipe.data.open_on_device()
        example = _example(recipe, given, micro, prepare) if recipe.plan.pp > 1 else None
        model = build_model(recipe, given)
        loss_fn = given.loss_fn or loss_by_name(recipe.loss)
        utilisation = open_utilisation(recipe, mesh, model, loss_fn, prepare)
        model = parallelize(model, mesh, recipe.plan, example=example)
        optimizer = build_optimizer(
            recipe.optimizer.name,
            model,
            lr=recipe.optimizer.rate_for(whole),
            args=recipe.optimizer.args,
        )
        tell = _SkippedTeller()
        batches = recipe.data.open_training(
            size=micro,
            rank=mesh.data_axes.rank,
            world_size=mesh.data_axes.size,
            seed=recipe.train.seed,
            on_skip=tell,
            source=given.source,
        )
        closing.callback(close, batches)
        held_out = _open_evaluation(recipe, mesh, micro, given, closing)
        refuse_unlike_feeders(mesh.world, batches, held_out)
        checkpointer = _open_checkpointer(recipe, folder, mesh) if recipe.checkpoint.every else None
        if checkpointer is not None:
            closing.push(_Closing(checkpointer))
        trainer = Trainer(
            model,
            optimizer,
            loss_fn,
            batches,
            mesh=mesh,
            config=recipe.train,
            accumulation=accumulation,
            schedule=recipe.schedule,
            evaluation=_passes(recipe, held_out) if held_out is not None else None,
            checkpointer=checkpointer,
            save_every=recipe.checkpoint.every,
            observers=observers,
            watchers=[*given.watchers, *watchers_of(recipe, mesh, folder, model=model, batches=batches)],
            report_every=recipe.monitor.log_interval,
            utilisation=utilisation,
            system=system_numbers(
                recipe.monitor, folder.path, device=mesh.device, is_first_of_host=mesh.local_rank == 0
            ),
            prepare=prepare,
            step_fn=load_object(recipe.train.step_fn, key="train.step_fn") if recipe.train.step_fn else None,
            finish=_finish(recipe, model, mesh, folder),
            metadata=metadata,
            folder=str(folder.path),
        )
        trainer.observers.deadline_seconds = recipe.monitor.observer_deadline_seconds
        closing.callback(trainer.observers.close)
        tell.observers = trainer.observers
        _begin_or_resume(recipe, trainer, checkpointer)
        yield trainer


def refuse_schedule(plan: Plan, accumulation: int) -> None:
    """PlanError where a pipeline's schedule cannot run with the micro-batches of a step."""
    if plan.pp > 1:
        from trainfleet.parallel.pipeline.schedules import refuse_micro_batches

        refuse_micro_batches(plan, accumulation * plan.microbatches)


def _example(recipe: Recipe, given: Given, size: int, prepare: Callable[..., Batch] | None) -> Batch:
    """The first micro-batch of the recipe's stream, from a stream of its own, as the model gets it."""
    batches = recipe.data.open_training(size=size, seed=recipe.train.seed, source=given.source)
    try:
        return prepare(next(batches)) if prepare is not None else next(batches)
    finally:
        close(batches)


def _told_to_the_launcher() -> list[Observer]:
    """Our own launcher reads how far a rank has come, also of one that was killed."""
    environment = RankEnvironment.from_env()
    if environment.launcher != "trainfleet" or environment.error_file is None:
        return []
    return [Progress(Path(environment.error_file).parent)]


def build_model(recipe: Recipe, given: Given) -> nn.Module:
    """The recipe's model, plain, with the numbers of `train.seed`; or the one that a program gives."""
    from torch import nn

    from trainfleet.parallel.deferred import deferred

    if isinstance(given.model, nn.Module):
        return given.model
    if given.model is not None:
        build = given.model
    elif recipe.model.name is None:
        raise ConfigError("model.name is not set. Name the class of the model as 'package.module:Name'.")
    else:
        maker = load_object(recipe.model.name, key="model.name")

        def build() -> nn.Module:
            return maker(**recipe.model.args)  # type: ignore[no-any-return]

    try:
        model = deferred(build) if recipe.model.deferred else build()
    except TypeError as exc:
        raise ConfigError(
            f"model.name {recipe.model.name!r} does not take model.args {recipe.model.args}: {exc}"
        ) from exc
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.name {recipe.model.name!r} made a {type(model).__name__}; it must make an nn.Module.")
    return model


def open_run_folder(recipe: Recipe, mesh: Mesh, closing: ExitStack) -> RunFolder:
    """The folder, held until `closing` closes, made and described by rank 0.

    With `resume: never`, what an earlier run left is moved aside.
    """
    folder = RunFolder(recipe.folder)
    failure: list[str | None] | None = None
    if mesh.is_main:
        try:
            folder.create()
            closing.callback(folder.hold().close)
            if recipe.checkpoint.resume == "never" and (aside := folder.set_aside()):
                logger.info("The earlier run in %s was moved to %s.", folder.path, aside)
                folder.create()
                closing.callback(folder.hold().close)  # the first hold went along with the earlier run
            folder.write_recipe(to_yaml(without_tokens(recipe)))
            folder.write_environment(world_size=mesh.world_size, device=mesh.device, plan=str(recipe.plan))
        except StoreError as exc:
            failure = [str(exc), exc.hint]
    # The others must hear of it, or they would wait for rank 0 until their deadline.
    if told := mesh.world.exchange(failure)[0]:
        raise StoreError(told[0], hint=told[1])
    return folder


def _open_checkpointer(recipe: Recipe, folder: RunFolder, mesh: Mesh) -> Checkpointer:
    config = recipe.checkpoint
    return Checkpointer(
        open_store(config.folder or str(folder.checkpoints)),
        retention=config.retention,
        group=mesh.world,
        timeout=timedelta(seconds=config.timeout_seconds),
        export=config.export,
        save_function=load_object(config.save_function, key="checkpoint.save_function")
        if config.save_function
        else None,
    )


class _Closing(AbstractContextManager[None]):
    """Closes a checkpointer. After the loss of a peer a save is given a moment only: its other shards may never come,
    and whoever is to start anew waits for this rank to end."""

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, PeerError):
            try:
                self._checkpointer.wait(_AFTER_A_LOSS)
            except CheckpointError as failed:
                logger.info("%s", failed)
                return  # its writer ends with this process
        self._checkpointer.__exit__(kind, error, trace)


def _begin_or_resume(recipe: Recipe, trainer: Trainer, checkpointer: Checkpointer | None) -> None:
    if checkpointer is not None and recipe.checkpoint.resume != "never":
        step = trainer.restore(cast=recipe.checkpoint.cast)
        if step is not None:
            return
    if recipe.checkpoint.resume == "must":
        raise CheckpointError(
            f"checkpoint.resume is 'must', but there is no checkpoint in {recipe.checkpoint.folder or recipe.folder}.",
            hint="Look for the right folder, or begin with resume=auto.",
        )
    if recipe.model.init_from is not None:
        _load_weights(recipe, recipe.model.init_from, trainer)


def _load_weights(recipe: Recipe, path: str, trainer: Trainer) -> None:
    """Weights alone, from wherever `load_weights` finds them."""
    from trainfleet.checkpoint.weights import load_weights

    try:
        load_weights(path, trainer.engine.state()["model"], group=trainer.mesh.world, cast=recipe.checkpoint.cast)
    except CheckpointError as error:
        raise CheckpointError(f"model.init_from is {path!r}: {error}", hint=error.hint) from error


def _open_evaluation(recipe: Recipe, mesh: Mesh, micro: int, given: Given, closing: ExitStack) -> Any:
    batches = recipe.data.open_evaluation(
        size=micro,
        rank=mesh.data_axes.rank,
        world_size=mesh.data_axes.size,
        seed=recipe.train.seed,
        source=given.evaluation_source,
        training=given.source,
    )
    if batches is not None:
        closing.callback(close, batches)
    return batches


def _passes(recipe: Recipe, batches: Any) -> Callable[[], Iterable[Batch]]:
    limit = recipe.train.evaluate_batches or math.inf

    def one_pass() -> Iterable[Batch]:
        batches.rewind()
        return batches if limit == math.inf else itertools.islice(batches, int(limit))

    return one_pass


def _finish(
    recipe: Recipe, model: nn.Module, mesh: Mesh, folder: RunFolder
) -> Callable[[], Mapping[str, float | str]] | None:
    if recipe.train.finish is None:
        return None
    finish = load_object(recipe.train.finish, key="train.finish")

    def call() -> Mapping[str, float | str]:
        import torch

        model.eval()
        with torch.no_grad():
            return finish(model, mesh, folder.path)  # type: ignore[no-any-return]

    return call


class _SkippedTeller:
    """Turns skipped samples into events, once there is somebody to tell."""

    def __init__(self) -> None:
        self.observers: Any = None

    def __call__(self, count: int, example: str) -> None:
        if self.observers is not None:
            self.observers.emit(SamplesSkipped(count=count, example=example))


def close(stream: Any) -> None:
    if hasattr(stream, "close"):
        stream.close()
