"""verify for a recipe: its own model, data, loss and optimizer, in one process and under its plan."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainfleet.batch import Batch
from trainfleet.training.deepspeed_file import with_deepspeed_file
from trainfleet.training.job import Given, build_model
from trainfleet.training.losses import loss_by_name
from trainfleet.training.proof.case import Case
from trainfleet.training.proof.verdict import Verdict
from trainfleet.training.proof.verify import prove
from trainfleet.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def verify_recipe(recipe: Recipe, nproc: int, *, steps: int = 3) -> Verdict:
    """Take `steps` steps of the recipe in this process and under its plan on `nproc` processes, and compare.

    Nothing is written. What the recipe names by import path must be importable in other processes too.
    """
    recipe = with_deepspeed_file(recipe)
    ranks = recipe.plan.data_ranks(nproc)
    _, accumulation, _ = recipe.batch.resolve(ranks)
    return prove(case_of(recipe, ranks, steps=steps, accumulation=accumulation), recipe.plan, nproc)


def case_of(recipe: Recipe, ranks: int, *, steps: int, accumulation: int) -> Case:
    """The recipe on so many data-parallel ranks as a Case.

    Its model is built plainly, since a deferred one has the same numbers.
    """
    plain = replace(recipe, model=replace(recipe.model, deferred=False))
    return Case(
        build=functools.partial(build_model, plain, Given()),
        loss_fn=loss_by_name(recipe.loss),
        micro_batch=_MicroBatches(recipe, recipe.batch.resolve(ranks)[0]),
        optimizer=functools.partial(_optimizer, recipe, recipe.batch.resolve(ranks)[2]),
        prepare=recipe.data.open_on_device(),
        steps=steps,
        accumulation=accumulation,
        clip_norm=recipe.train.clip_norm,
        seed=recipe.train.seed,
        keep_activations=True,
    )


def _optimizer(recipe: Recipe, global_batch: int, model: nn.Module) -> Optimizer:
    from trainfleet.parallel.optimizers import build_optimizer

    rate = recipe.optimizer.rate_for(global_batch)
    return build_optimizer(recipe.optimizer.name, model, lr=rate, args=recipe.optimizer.args)


class _MicroBatches:
    """The recipe's micro-batches by number, asked for in rising order: each process reads past those of the others."""

    def __init__(self, recipe: Recipe, size: int) -> None:
        self._recipe, self._size = recipe, size
        self._stream: Any = None
        self._next = 0

    def __call__(self, number: int) -> Batch:
        if self._stream is None or number < self._next:
            if self._stream is not None:
                self._stream.close()
            self._stream = self._recipe.data.open_training(size=self._size, seed=self._recipe.train.seed)
            self._next = 0
        while self._next < number:
            next(self._stream)
            self._next += 1
        self._next += 1
        return next(self._stream)

    def __getstate__(self) -> tuple[Recipe, int]:
        return self._recipe, self._size

    def __setstate__(self, state: tuple[Recipe, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]
