"""Our loop: the Trainer with everything that a recipe switches on by default, and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from loops.setting import CLIP_NORM, Batch, Step, mean_loss, optimizer_for
from torch import nn

from trainfleet import Checkpointer, Mesh, Plan, Trainer, open_store, parallelize
from trainfleet.events import Event, StepEnded
from trainfleet.monitor import MonitorConfig, RunFolder, observers_for
from trainfleet.parallel import make_engine
from trainfleet.training.recipe import TrainConfig
from trainfleet.training.schedule import ScheduleConfig


class Losses:
    """An observer that keeps each step's loss; it is that of all ranks. In the loop, as those of a recipe are."""

    in_loop = True

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepEnded):
            self.seen.append(event.loss)


class InEngine:
    """The engine alone, in a loop written by hand."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model = parallelize(model, Mesh.from_env(plan, device="cpu"), plan)
        self.optimizer = optimizer_for(self.model)
        self.engine = make_engine(self.model, self.optimizer, mean_loss)

    def run(self, steps: Sequence[Step]) -> list[float]:
        losses = []
        for micro_batches in steps:
            losses.append(self.engine.forward_backward(micro_batches).mean)
            self.engine.clip(CLIP_NORM)
            self.engine.step()
        return losses


class InTrainer:
    """`fit` runs from the first step to the last; what others do in between happens when it asks for a batch."""

    def __init__(self, model: nn.Module, mesh: Mesh, plan: Plan, folder: Path, *, accumulation: int, save_every: int):
        model = parallelize(model, mesh, plan)
        files = RunFolder(folder)
        if mesh.is_main:
            files.create()
        self.losses = Losses()
        self.checkpointer = Checkpointer(open_store(str(files.checkpoints)), group=mesh.data_axes)
        self.turns = Turns()
        self.trainer = Trainer(
            model,
            optimizer_for(model),
            mean_loss,
            self.turns,
            mesh=mesh,
            config=TrainConfig(clip_norm=CLIP_NORM),
            accumulation=accumulation,
            schedule=ScheduleConfig(name="constant"),
            observers=[*observers_for(MonitorConfig(), files, mesh.is_main), self.losses],
            checkpointer=self.checkpointer,
            save_every=save_every,
        )

    def fit(self, steps: Sequence[Step], breaks: Sequence[int], between: Callable[[], None]) -> list[tuple[float, ...]]:
        """Take all steps; (wall, processor) seconds of each block that begins with one of the steps `breaks`.

        The last break ends the last block; `between` runs at each of them, and is not timed.
        """
        self.turns.begin(steps, breaks, between)
        self.trainer.fit(len(steps))
        self.checkpointer.close()
        self.trainer.observers.close()
        return self.turns.blocks


class Turns:
    """The batches of `steps`; at each break it stops the clock and lets the others run."""

    def begin(self, steps: Sequence[Step], breaks: Sequence[int], between: Callable[[], None]) -> None:
        self.blocks: list[tuple[float, ...]] = []
        self._batches = self._walk(steps, set(breaks), between)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def _walk(self, steps: Sequence[Step], breaks: set[int], between: Callable[[], None]) -> Iterator[Batch]:
        begun: tuple[float, ...] | None = None
        for i, step in enumerate(steps):
            if i in breaks:
                if begun is not None:
                    self.blocks.append(elapsed(begun))
                between()
                begun = clocks()
            yield from step


def clocks() -> tuple[float, ...]:
    """Seconds by the clock on the wall, and seconds that all threads of this process have computed."""
    return time.perf_counter(), time.process_time()


def elapsed(begun: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(now - then for now, then in zip(clocks(), begun))
