"""verify: does a plan compute what one process computes? Compared tensor by tensor, in the order of computation.

One process takes the micro-batches of all ranks one after the other; the ranks take their shares. What modules give in
the first step, and losses, gradient norms, gradients and parameters of each step are gathered and compared, and the
first that differs is named.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainfleet.batch import Batch
from trainfleet.errors import DataError
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case, comparable
from trainfleet.training.proof.reference import Reference
from trainfleet.training.proof.trace import trace_rank
from trainfleet.training.proof.verdict import Verdict

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def verify(
    model: nn.Module | Callable[[], nn.Module],
    plan: Plan,
    batches: Sequence[Batch],
    *,
    loss_fn: Callable[[Any, Batch], Any] | str = "model",
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    nproc: int | None = None,
    accumulation: int = 1,
    clip_norm: float | None = 1.0,
    seed: int = 0,
) -> Verdict:
    """Does `plan` compute for `model` what one process computes? For test suites: `assert verdict.holds, verdict`.

    `batches` are micro-batches; each step takes `accumulation` of them for every rank that sees different data, and
    there are as many steps as they suffice for. `loss_fn` is (output, batch) -> loss, or a name as in a recipe;
    `model` is the loss that the model computes itself. `optimizer` makes one for a model: AdamW with a rate of 1e-3
    if none is given. The plan runs on `nproc` real processes, or as few as it needs, at least two.
    DataError where the batches do not suffice for one step; what a rank raised, where it fails under the plan.
    """
    from trainfleet.training.losses import loss_by_name

    nproc = nproc or plan.fewest_ranks()
    ranks = plan.data_ranks(nproc)
    steps, left = divmod(len(batches), ranks * accumulation)
    if not steps:
        raise DataError(
            f"A step of this plan takes {ranks * accumulation} micro-batches ({accumulation} for each of {ranks} data "
            f"ranks), but {left} are given. Give more batches."
        )
    case = Case(
        build=_Copied(model),
        loss_fn=loss_by_name(loss_fn) if isinstance(loss_fn, str) else loss_fn,
        micro_batch=_Listed(tuple(batches)),
        optimizer=optimizer or _adamw,
        steps=steps,
        accumulation=accumulation,
        clip_norm=clip_norm,
        seed=seed,
        keep_activations=True,
    )
    return prove(case, plan, nproc)


@dataclass(frozen=True, slots=True)
class _Copied:
    """A builder that gives a new copy each time, so that no run sees what another made of the model."""

    model: nn.Module | Callable[[], nn.Module]

    def __call__(self) -> nn.Module:
        from torch import nn

        return copy.deepcopy(self.model) if isinstance(self.model, nn.Module) else self.model()


@dataclass(frozen=True, slots=True)
class _Listed:
    batches: tuple[Batch, ...]

    def __call__(self, number: int) -> Batch:
        return self.batches[number]


def _adamw(model: nn.Module) -> Optimizer:
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def prove(case: Case, plan: Plan, nproc: int) -> Verdict:
    """Run `case` in this process and under `plan` on `nproc` processes, and compare.

    The parts of `case` must be functions with a name of their own, or the processes cannot find them.
    """
    from trainfleet.training.ranks.launch import launch

    case, plan, remarks = comparable(case, plan)
    reference = Reference.of(case, plan, plan.data_ranks(nproc))
    return reference.verdict(launch(trace_rank, nproc, (case, plan, reference.ties)), remarks)
