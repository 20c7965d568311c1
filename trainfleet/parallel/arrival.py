"""A micro-batch arrives on the device: moved there, then prepared, as by a cast of pixels to floats."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from trainfleet.batch import Batch, to_device
from trainfleet.errors import DataError
from trainfleet.mesh import Mesh
from trainfleet.parallel.randomness import mixed, number_in_step, seed_micro_batch
from trainfleet.plan import Plan
from trainfleet.stopwatch import timed

Prepare: TypeAlias = Callable[..., Batch]
"""batch -> batch. One that has a parameter `training` is told by it whether the batch is trained on."""

_OWN = 0x70726570
"""Sets the random numbers of `prepare` apart from those of the model."""


class Arrival:
    """Brings micro-batches to the device of a mesh.

    `prepare` is called there without gradients, for training and for evaluation. What it draws from torch's generators
    is a function of (seed, step, micro-batch), and moves none of the model's own random numbers; with `seed` None, and
    in evaluation, the generators are left alone.
    """

    def __init__(self, prepare: Prepare | None, mesh: Mesh, plan: Plan, seed: int | None) -> None:
        self._prepare, self._mesh, self._parts, self._seed = prepare, mesh, plan.microbatches, seed
        self._is_told = prepare is not None and "training" in _parameters(prepare)

    def __call__(self, batch: Batch, step: int, i: int) -> Batch:
        """This rank's `i`-th micro-batch of a step of training."""
        with timed("transfer"):
            batch = to_device(batch, self._mesh.device)
            if self._prepare is None:
                return batch
            if self._seed is not None:
                number = number_in_step(i, self._parts, self._mesh.data_axes)
                seed_micro_batch(mixed(self._seed ^ _OWN), step, number)
            return self._prepared(batch, training=True)

    def for_evaluation(self, batch: Batch) -> Batch:
        batch = to_device(batch, self._mesh.device)
        return batch if self._prepare is None else self._prepared(batch, training=False)

    def _prepared(self, batch: Batch, *, training: bool) -> Batch:
        assert self._prepare is not None
        told = {"training": training} if self._is_told else {}
        with torch.no_grad():
            prepared = self._prepare(batch, **told)
        if prepared is None:
            raise DataError("The function that prepares batches on the device returned None; it must return the batch.")
        return prepared


def _parameters(prepare: Any) -> list[str]:
    try:
        return list(inspect.signature(prepare).parameters)
    except (TypeError, ValueError):
        return []
