"""Trainer: pulls a batch, takes a step; the same words as for torch models, over any mesh of NumPy ranks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np

from trainfleet.codec import Codec
from trainfleet.comm.gpu_memory import empty
from trainfleet.errors import DataError
from trainfleet.events import Observer, Observers, StepEnded
from trainfleet.loss import LossSum
from trainfleet.mpi.arrays import like
from trainfleet.mpi.layers import Sequential
from trainfleet.mpi.mesh import Mesh
from trainfleet.mpi.optimizers import Optimizer
from trainfleet.mpi.parallelize import parallelize
from trainfleet.mpi.pipeline import LossFunction, run_pipeline
from trainfleet.mpi.state import ModelState, OptimizerState
from trainfleet.mpi.timers import Timers
from trainfleet.state import Stateful


class Trainer:
    """Trains `model`, which every rank passes whole and alike, on `batches`: pairs or mappings of input and target.

    Ranks of equal `mesh.data_axes.rank` pass equal batches. Each batch is cut into `micro_batches`, which are
    accumulated, and in a pipeline follow each other. The gradient is that of sum(total) / sum(weight) of the LossSum
    over all micro-batches and ranks. `timers` tells where the time goes; its `group` is that of the mesh.
    """

    def __init__(
        self,
        model: Sequential,
        optimizer: Optimizer,
        loss_function: LossFunction,
        batches: Iterable[Any],
        *,
        mesh: Mesh,
        micro_batches: int = 1,
        schedule: Literal["gpipe", "1f1b"] = "1f1b",
        codec: Codec | None = None,
        observers: Iterable[Observer] = (),
        timers: Timers | None = None,
    ) -> None:
        self.step = 0
        self.mesh = mesh
        self._loss_function = loss_function
        self._batches: Iterator[Any] = iter(batches)
        self._micro_batches = micro_batches
        self._schedule: Literal["gpipe", "1f1b"] = schedule
        self._observers = Observers(observers)
        self._timers = timers
        self._kind = empty(next(iter(model.parameters.values()), np.empty(0)), (0,))
        """Of the library by which the model computes."""
        self.spread = parallelize(model, optimizer, mesh, codec=codec)

    def fit(self, steps: int) -> list[float]:
        """Go on until `steps` steps have been taken; the loss of each new one, the mean over all ranks."""
        losses = []
        while self.step < steps:
            began = time.perf_counter()
            with self._phase("data"):
                micro_batches = self._next_micro_batches()
            data_seconds = time.perf_counter() - began
            with self._phase("forward and backward"):
                passed = run_pipeline(
                    self.spread.model, micro_batches, self._loss_function, self.mesh["pp"], self._schedule
                )
            with self._phase("update"):
                loss = self._update(passed.loss, passed.gradients)
            self.step += 1
            losses.append(loss.mean)
            self._observers.emit(
                StepEnded(
                    step=self.step,
                    loss=loss.mean,
                    learning_rate=self.spread.optimizer.optimizer.learning_rate,
                    grad_norm=None,
                    samples=sum(len(inputs) for inputs, _ in micro_batches) * self.mesh.data_axes.size,
                    tokens=int(loss.weight),
                    seconds=time.perf_counter() - began,
                    data_seconds=data_seconds,
                )
            )
        return losses

    def _update(self, loss: LossSum, gradients: dict[str, Any]) -> LossSum:
        """One step by the gradient of all ranks' loss; returns that loss."""
        totals = np.array([loss.total, loss.weight], np.float64)
        self.mesh.data_axes.all_reduce_(totals).wait()
        zero = self.spread.optimizer
        if gradients:  # in stages 2 and 3 they are with the optimizer already
            zero.reduce_gradients(gradients)
        zero.step(self.mesh.data_axes.size / totals[1] if totals[1] else 0.0)
        return LossSum(float(totals[0]), float(totals[1]))

    def state(self) -> dict[str, Stateful]:
        """For a Checkpointer with `group=mesh.group`: `save(step, **trainer.state())`, `restore(**trainer.state())`."""
        return {"model": ModelState(self.spread), "optimizer": OptimizerState(self.spread)}

    def _next_micro_batches(self) -> list[tuple[Any, Any]]:
        batch = next(self._batches, None)
        if batch is None:
            raise DataError(f"The batches ended after step {self.step}. Give more of them, or ask for fewer steps.")
        inputs, targets = (batch["input"], batch["target"]) if isinstance(batch, Mapping) else batch
        if type(self._kind) is not np.ndarray:
            inputs, targets = like(self._kind, inputs), like(self._kind, targets)
        if len(inputs) < self._micro_batches:
            raise DataError(f"A batch of {len(inputs)} cannot be cut into {self._micro_batches} micro-batches.")
        bounds = [len(inputs) * part // self._micro_batches for part in range(self._micro_batches + 1)]
        return [(inputs[first:end], targets[first:end]) for first, end in itertools.pairwise(bounds)]

    def _phase(self, name: str) -> Any:
        return nullcontext() if self._timers is None else self._timers(name)
