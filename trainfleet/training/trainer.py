"""Trainer: pulls batches, takes steps, emits events, evaluates, saves. It drives an Engine and knows no kind of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from trainfleet.batch import Batch, BatchStream, batch_size
from trainfleet.checkpoint import Checkpointer
from trainfleet.errors import ConfigError, PeerError
from trainfleet.events import (
    Event,
    Noted,
    Observer,
    Observers,
    Restored,
    RunEnded,
    RunStarted,
    StepEnded,
)
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.monitor import used_bytes
from trainfleet.monitor.anomalies import AnomalyConfig
from trainfleet.parallel import Ema, Engine, make_engine
from trainfleet.parallel.cuda_marks import stopwatch_for
from trainfleet.parallel.randomness import Generators
from trainfleet.parallel.replicas import check_replicas
from trainfleet.parallel.spread import num_parameters
from trainfleet.state import Stateful, stateful_among
from trainfleet.stopwatch import timed
from trainfleet.tracks import Tracks
from trainfleet.training.evaluations import Evaluations
from trainfleet.training.inspection import Inspector
from trainfleet.training.outcome import Outcome
from trainfleet.training.rank_reports import RankReports
from trainfleet.training.ranks.failure import note_step
from trainfleet.training.recipe import TrainConfig
from trainfleet.training.rollbacks import Rollbacks
from trainfleet.training.saves import Saves
from trainfleet.training.schedule import Rates, ScheduleConfig
from trainfleet.training.stop import StopVote
from trainfleet.training.supply import Supply
from trainfleet.training.utilisation import Utilisation
from trainfleet.training.watchers.before import Before
from trainfleet.training.watchers.watcher import Judgement, UnderWay, Watcher, Watchers
from trainfleet.training.watchers.watching import watchers_for

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class Trainer:
    """Trains a spread model on a stream of micro-batches.

        model = parallelize(MyModel(), mesh, plan)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        Trainer(model, optimizer, loss_fn, batches, mesh=mesh).fit(steps=10_000)

    `evaluation` gives the batches of one pass each time it is called. `states` are further things to save and
    restore; observers that are Stateful are saved as well. `watchers` look at each step on every rank: unless given,
    those of AnomalyConfig(), with an Inspector. Each `report_every` steps all ranks tell what they measured, with the
    numbers of their machine that `system` gives; `utilisation` knows the MFU of a step.
    `step_fn(engine, micro_batches) -> LossSum` takes the place of `engine.forward_backward`; `prepare(batch)` is called
    first, on the device. `finish` is called when all steps are done; what it returns stands in the summary of the run,
    a text named `sample` above it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: Callable[[Any, Batch], Any],
        batches: BatchStream | Iterable[Batch],
        *,
        mesh: Mesh,
        config: TrainConfig | None = None,
        accumulation: int = 1,
        schedule: ScheduleConfig | None = None,
        evaluation: Callable[[], Iterable[Batch]] | None = None,
        checkpointer: Checkpointer | None = None,
        save_every: int | None = None,
        observers: Sequence[Observer] = (),
        watchers: Sequence[Watcher] | None = None,
        report_every: int = 10,
        system: Callable[[], Mapping[str, float]] | None = None,
        utilisation: Utilisation | None = None,
        states: Mapping[str, Stateful] | None = None,
        prepare: Callable[[Batch], Batch] | None = None,
        step_fn: Callable[[Engine, Sequence[Batch]], LossSum] | None = None,
        finish: Callable[[], Mapping[str, float | str]] | None = None,
        engine: Engine | None = None,
        metadata: Mapping[str, Any] | None = None,
        folder: str | None = None,
    ) -> None:
        self.config = config or TrainConfig()
        self.mesh = mesh
        self._num_parameters = num_parameters(model)  # an engine may cut them
        self.engine = engine or make_engine(model, optimizer, loss_fn, prepare=prepare, seed=self.config.seed)
        self.model = model
        self.optimizer = optimizer
        self.batches = batches
        self.observers = Observers(observers)
        self.step = 0
        """Optimizer steps taken, skipped ones included."""
        self.steps = self.config.steps_of(batches, accumulation)
        """Optimizer steps of the whole run, unless `fit` is told otherwise."""
        self.ema = Ema(model, self.config.ema_decay) if self.config.ema_decay else None
        self._supply = Supply(batches, accumulation)
        self._rates = Rates(optimizer, schedule or ScheduleConfig(name="constant"))
        self._saves = (
            Saves(checkpointer, emit=self.observers.emit, metadata=metadata or {}) if checkpointer is not None else None
        )
        self._save_every = save_every
        self._states = {**stateful_among(observers), **(states or {})}
        self._step_fn = step_fn or (lambda engine, micro_batches: engine.forward_backward(micro_batches))
        self._finish = finish
        self._metadata = metadata or {}
        self._folder = folder
        self._rollbacks: Rollbacks | None = None
        if watchers is None:
            anomalies = AnomalyConfig()
            before = Before(model, whole=anomalies.forgoes_updates)
            inspector = Inspector(before, batches, clip_norm=self.config.clip_norm, step_fn=step_fn)
            watchers = watchers_for(self.config, mesh, inspector, anomalies=anomalies)
        self._watchers = Watchers(watchers, self.observers.emit)
        self.observers.add(self._watchers)
        # Of ranks that compute the same on the same data, the first counts.
        new_tracks = partial(Tracks, counts=self.engine.plan.tp == 1 or mesh["tp"].rank == 0)
        self._tracks = new_tracks()
        self._evaluations = Evaluations(
            evaluation, patience=self.config.early_stopping, world=mesh.world, new_tracks=new_tracks
        )
        self._reports = RankReports(
            mesh.world, self._tracks, every=report_every, device=mesh.device, system=system, tell=self._watchers.tell
        )
        self._utilisation = utilisation
        self._stopwatch = stopwatch_for(mesh.device)
        if self.config.evaluate_every and evaluation is None:
            raise ConfigError(
                f"train.evaluate_every is {self.config.evaluate_every}, but there is nothing to evaluate on. "
                "Give data.evaluation, or leave evaluate_every out."
            )
        if self.config.evaluate_every == "epoch" and self._supply.epochs_done is None:
            raise ConfigError(
                "train.evaluate_every is `epoch`, but the training data does not know where its epochs end. "
                "Give a number of steps."
            )

    def fit(self, steps: int | None = None) -> Outcome:
        """Train until `steps` optimizer steps have been taken in all, those before a resume included.

        Ctrl-C and SIGTERM, on any rank, end it after the step under way, with a checkpoint where there is a
        checkpointer. Whatever ends it, observers hear `RunEnded`.
        """
        steps = steps or self.steps
        started = time.monotonic()
        loss: float | None = None
        summary: dict[str, float | str] = {}
        reason, lost_peer = "finished", False
        self._emit(self._run_started(steps))
        try:
            if self.config.rollback_every is not None:
                states = {name: state for name, state in self.all_states().items() if name != "data"}
                self._rollbacks = Rollbacks(states, most=self.config.max_rollbacks)
                self._rollbacks.remember(self.step)
            with StopVote(self.mesh.world) as vote, self._stopwatch, self._tracks, self._watchers:
                self._watchers.start(self.engine)
                while self.step < steps and reason == "finished":
                    before = self.step
                    loss = self._take_step(steps, vote)
                    reason = self._after_step(steps, vote, went_on=self.step > before)
                for event in self._reports.finish():
                    self._emit(event)
            self._save_last()
            if reason != "interrupted":
                summary = self._summary()
            if self._saves is not None:
                self._saves.refuse_unsaved_end(self.mesh.world, self.step)
        except BaseException as exc:
            note_step(exc, self.step)
            reason = "interrupted" if isinstance(exc, KeyboardInterrupt) else str(exc) or type(exc).__name__
            lost_peer = isinstance(exc, PeerError)
            raise
        finally:
            seconds = time.monotonic() - started
            ended = RunEnded(step=self.step, reason=reason, seconds=seconds, summary=summary, lost_peer=lost_peer)
            self._emit(ended)
        return Outcome(step=self.step, reason=reason, loss=loss, evaluation=self._evaluations.last)

    def _after_step(self, steps: int, vote: StopVote, *, went_on: bool) -> str:
        """Evaluate and save where that is due; `finished` unless the run has to end here.

        After a rollback (not `went_on`) nothing is due: it was done when the run first came to that step.
        """
        if self._saves is not None and self._save_every is not None:
            self._saves.tell()
            if not self._saves.is_prepared:
                self._saves.prepare(self.all_states())
        if vote.says_stop():
            return "interrupted"
        if not went_on:
            return "finished"
        every = self.config.evaluate_every
        due = self._supply.ended_epoch if every == "epoch" else self._is_due(every)
        evaluate = due or (self.step == steps and self._evaluations.passes is not None)
        if evaluate and self._evaluations.is_enough(self.evaluate()):
            return "stopped early"
        if self._is_due(self._save_every):
            self.save()
        if self._rollbacks is not None and self._is_due(self.config.rollback_every):
            with timed("checkpoint"):
                self._rollbacks.remember(self.step)
        return "finished"

    def _summary(self) -> dict[str, float | str]:
        summary: dict[str, float | str] = {}
        if self._evaluations.last is not None:
            summary["validation loss"] = self._evaluations.last
        if self._finish is not None:
            found = dict(self._finish())
            if "sample" in found:
                self._emit(Noted(step=self.step, title="sample", text=str(found.pop("sample"))))
            summary |= found
        return summary

    # one step

    def _take_step(self, steps: int, vote: StopVote) -> float:
        begun = time.perf_counter()
        self._tracks.step = self.step + 1
        with timed("data"):
            micro_batches = self._supply.take(self.step)
        with timed("observers"):
            self._watchers.begin(self.step + 1, micro_batches)
        rate = self._rates.set(self.step + 1, steps)
        vote.begin()
        loss = self._step_fn(self.engine, micro_batches)
        norm = self.engine.clip(self.config.clip_norm)
        scale = getattr(self.engine, "loss_scale", None)
        judgement = self._judge(micro_batches, loss.mean, norm, scale)
        if judgement is not None and judgement.policy == "rollback":
            self._roll_back(judgement.what)
            return loss.mean
        skips = judgement is not None and judgement.policy == "skip"
        updated = self.engine.skip() if skips else self.engine.step()
        self.step += 1
        if self.ema is not None and updated:
            with timed("optimizer"):
                self.ema.update()
        if self._is_due(self.config.check_replicas_every):
            check_replicas(self.model)
        samples = sum(batch_size(batch) for batch in micro_batches) * self.mesh.data_axes.size
        # A loss that weighs tokens knows their number; one that does not weighs micro-batches.
        tokens = max(samples, round(loss.weight))
        ended_before, phases = self._stopwatch.taken_at, self._stopwatch.take()
        seconds = self._stopwatch.taken_at - begun
        ended = StepEnded(
            step=self.step,
            loss=loss.mean,
            learning_rate=rate,
            grad_norm=norm,
            samples=samples,
            tokens=tokens,
            seconds=seconds,
            data_seconds=self._supply.seconds,
            between_seconds=begun - ended_before,
            phases=phases,
            waits=self._supply.waits,
            received_bytes=self._supply.received_bytes,
            ready=self._supply.ready,
            skipped=not updated,
            loss_scale=scale,
            memory_bytes=used_bytes(self.mesh.device),
            mfu=self._utilisation.of(self.step, micro_batches, tokens, seconds) if self._utilisation else None,
        )
        with timed("observers"):
            self._watchers.end(ended)
        self._emit(ended)
        for event in self._reports.add(ended):
            self._emit(event)
        return loss.mean

    def _judge(self, micro_batches: Sequence[Batch], loss: float, norm: float, scale: float | None) -> Judgement | None:
        """What the watchers say of the step before its update; AnomalyStopped where that is to stop the run."""
        under_way = UnderWay(
            step=self.step + 1,
            micro_batches=micro_batches,
            engine=self.engine,
            loss=loss,
            grad_norm=norm,
            loss_scale=scale,
        )
        with timed("observers"):
            judgement = self._watchers.judge(under_way)
        if judgement is not None and judgement.policy == "stop":
            self._save_last()
            raise judgement.error(self.step + 1)
        return judgement

    def _roll_back(self, what: str) -> None:
        """Go back to the last copy; the batches that led here are left out, for the stream goes on where it is."""
        assert self._rollbacks is not None
        failed = self.step + 1
        with timed("checkpoint"):
            step = self._rollbacks.go_back(failed, what)
        self._emit(Noted(step=step, title="rollback", text=f"{what} in step {failed}; back to step {step}"))
        self._emit(Restored(step=step, path="memory"))

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.step > 0 and self.step % every == 0

    # evaluation

    def evaluate(self) -> float:
        """The mean loss over `evaluation`, of the averaged weights if there is an average."""
        evaluated = self._evaluations.run(self.engine, self.ema, self.step)
        self._emit(evaluated)
        return evaluated.loss

    # checkpoints

    def save(self) -> None:
        """Begin a checkpoint of this step; how the one before ended is told to the observers."""
        self._needed_saves("save with").save(self.step, self.all_states(), self._evaluations.metrics_at(self.step))

    def _save_last(self) -> None:
        if self._saves is not None and self._save_every is not None:
            self._saves.save_last(self.step, self.all_states(), self._evaluations.metrics_at(self.step))

    def restore(self, *, cast: bool = False) -> int | None:
        """Go on from the newest whole checkpoint: its step, or None if there is none. `cast` allows other dtypes."""
        return self._needed_saves("restore from").restore(self.all_states(), cast=cast)

    def has_checkpoint(self) -> bool:
        """Whether anything was committed that `restore` could go on from; whether it is whole, `restore` finds out."""
        return self._saves is not None and self._saves.checkpointer.has_checkpoint()

    def reset(self) -> None:
        """Remove every checkpoint. Nothing else ever does, and the model stays as it is; all ranks call it."""
        self._needed_saves("remove checkpoints of").reset()

    def _needed_saves(self, purpose: str) -> Saves:
        if self._saves is None:
            raise ConfigError(f"There is no checkpointer to {purpose}; give the Trainer `checkpointer`.")
        return self._saves

    def all_states(self) -> dict[str, Stateful]:
        """What a checkpoint holds: all that the next step depends on, and what observers remember."""
        states = {**self.engine.state(), "trainer": self, "generators": Generators(), **self._states}
        if isinstance(self.batches, Stateful):
            states["data"] = self.batches
        if self.ema is not None:
            states["ema"] = self.ema
        return states

    def state_dict(self) -> dict[str, Any]:
        """The trainer's own few numbers; the checkpoint holds them beside those of the engine and the data."""
        return {"step": self.step, **self._evaluations.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self.step = int(state["step"])
        self._evaluations.load_state_dict(state)

    # events

    def _run_started(self, steps: int) -> RunStarted:
        return RunStarted(
            folder=self._folder,
            steps=steps,
            start_step=self.step,
            world_size=self.mesh.world_size,
            parameters=self._num_parameters,
            plan=str(self.engine.plan),
            recipe=self._metadata.get("recipe", {}),
        )

    def _emit(self, event: Event) -> None:
        self.observers.emit(event)
