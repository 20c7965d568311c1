"""The case that `verify` runs for a recipe: its model, loss, optimizer, and the first of its own batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainfleet.batch import Batch
from trainfleet.errors import DataError
from trainfleet.train.job import Given, build_model
from trainfleet.train.losses import loss_by_name
from trainfleet.train.recipe import Recipe
from trainfleet.train.verify import Case

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def case_of(recipe: Recipe, nproc: int, *, steps: int = 3) -> Case:
    """What `recipe` computes in its first `steps` steps on `nproc` processes, at a constant rate.

    The batches are read here, once, so that one process and the ranks compute on the same bits.
    DataError where the data do not suffice.
    """
    micro, accumulation, whole = recipe.batch.resolve(nproc)
    return Case(
        build=_Model(recipe),
        loss_fn=loss_by_name(recipe.loss),
        micro_batch=_Batches(_first_batches(recipe, micro, steps * accumulation * nproc)),
        optimizer=_Optimizer(recipe, whole),
        steps=steps,
        accumulation=accumulation,
        clip_norm=recipe.train.clip_norm,
        seed=recipe.train.seed,
    )


def _first_batches(recipe: Recipe, size: int, count: int) -> tuple[Batch, ...]:
    stream = recipe.data.open_training(size=size, seed=recipe.train.seed)
    try:
        batches = tuple(batch for batch, _ in zip(stream, range(count)))
    finally:
        stream.close()
    if len(batches) < count:
        raise DataError(
            f"{recipe.data.source} gave {len(batches)} micro-batches of {size}, but {count} are compared. "
            "Compare fewer steps, or on fewer processes."
        )
    return batches


# The ranks get these by pickling, as functions in functions could not be.


@dataclass(frozen=True, slots=True)
class _Model:
    recipe: Recipe

    def __call__(self) -> nn.Module:
        return build_model(self.recipe, Given())


@dataclass(frozen=True, slots=True)
class _Batches:
    batches: tuple[Batch, ...]

    def __call__(self, number: int) -> Batch:
        return self.batches[number]


@dataclass(frozen=True, slots=True)
class _Optimizer:
    recipe: Recipe
    global_batch: int

    def __call__(self, model: nn.Module) -> Optimizer:
        from trainfleet.parallel.optimizers import build_optimizer

        config = self.recipe.optimizer
        rate = config.rate_for(self.global_batch)
        return build_optimizer(config.name, model.named_parameters(), lr=rate, args=config.args)
