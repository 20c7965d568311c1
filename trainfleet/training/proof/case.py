"""Case: the work that is done in one process and under a plan, and what of it can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trainfleet.batch import Batch, arrays, map_arrays
from trainfleet.plan import LossScale, Plan

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is run in both ways."""

    build: Callable[[], nn.Module]
    loss_fn: Callable[[Any, Batch], Any]
    micro_batch: Callable[[int], Batch]
    """The micro-batch of a number: step * (ranks * accumulation) + place in the step."""
    optimizer: Callable[[nn.Module], Optimizer]
    prepare: Callable[[Batch], Batch] | None = None
    """What is done to micro-batches on the device."""
    steps: int = 3
    accumulation: int = 1
    """Micro-batches of a rank in a step."""
    clip_norm: float | None = 1.0
    seed: int = 0
    keep_gradients: bool = True
    """Compare gradients too; without them, losses, norms and parameters."""
    keep_activations: bool = False
    """Compare what each module gave in the first step, too."""
    shake: float = 0.0
    """By what part of their size gradients are changed at random before each step."""
    only_last: bool = False
    """Compare the parameters of the last step only."""


def comparable(case: Case, plan: Plan) -> tuple[Case, Plan, tuple[str, ...]]:
    """`case` and `plan` without what one process cannot have alike, and remarks on what that was."""
    remarks: tuple[str, ...] = ()
    if has_batch_statistics(case):
        # Activations would be those of another batch.
        case = replace(case, build=_WithoutDropout(case.build), keep_activations=False)
        remarks = (
            "The model has batch statistics: one process takes the micro-batches of all ranks as one. "
            "Dropout would not be comparable then and is switched off.",
        )
        if plan.precision == "fp16":
            # One process would sum the gradients of all ranks in fp16, and overflow where they do not.
            plan = replace(plan, loss_scale=LossScale(initial=min(plan.loss_scale.initial, 1024.0)))
    if plan.compile and case.keep_activations:
        case = replace(case, keep_activations=False)
        remarks = (*remarks, "Compiled blocks do not show what is computed inside them: activations are not compared.")
    return case, plan, remarks


def together(case: Case, ranks: int) -> Case:
    """The same work for one process, which takes the micro-batches of all `ranks`.

    Where batch statistics are synchronised it must see the batch that all ranks see together, as one.
    """
    if has_batch_statistics(case):
        return replace(case, micro_batch=_Concatenated(case.micro_batch, ranks))
    return replace(case, accumulation=case.accumulation * ranks)


@dataclass(frozen=True, slots=True)
class _Concatenated:
    micro_batch: Callable[[int], Batch]
    ranks: int

    def __call__(self, number: int) -> Batch:
        import torch

        parts = [self.micro_batch(number * self.ranks + rank) for rank in range(self.ranks)]
        columns = iter([torch.cat(column) for column in zip(*(arrays(part) for part in parts))])
        return map_arrays(lambda _: next(columns), parts[0])


@dataclass(frozen=True, slots=True)
class _WithoutDropout:
    build: Callable[[], nn.Module]

    def __call__(self) -> nn.Module:
        from torch.nn.modules.dropout import _DropoutNd

        model = self.build()
        for module in model.modules():
            if isinstance(module, _DropoutNd):
                module.p = 0.0
        return model


def has_batch_statistics(case: Case) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(module, _BatchNorm) for module in case.build().modules())
