"""Spread: what `parallelize` did to a model, kept beside it for the engine, the checkpoints and the checks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.fsdp import FSDPModule

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel.layout import is_sharded
from trainfleet.parallel.torch_private import forget_iteration, waits_within
from trainfleet.plan import Plan
from trainfleet.stopwatch import timed

if TYPE_CHECKING:
    from trainfleet.parallel.budget import Budget
    from trainfleet.parallel.context.region import Context
    from trainfleet.parallel.pipeline import Pipeline
    from trainfleet.parallel.replicate import GradientAverage
    from trainfleet.parallel.tensor import Split

_ATTRIBUTE = "_trainfleet_spread"


@dataclass(kw_only=True)
class Spread:
    """How one model lies over one mesh."""

    plan: Plan
    mesh: Mesh
    average: GradientAverage
    """Averages the gradients of the parameters that are whole on every rank."""
    sharded: FSDPModule | None = None
    """The root of the sharded model, which is the model itself; None with zero = 0."""
    split: Split | None = None
    """Which layers are split over tensor-parallel ranks; None with tp = 1."""
    context: Context | None = None
    """Splits sequences over context-parallel ranks; None with cp = 1."""
    pipeline: Pipeline | None = None
    """Which stages this rank holds; None with pp = 1."""
    budget: Budget | None = None
    """Which blocks are recomputed, to be settled after the first step; None without plan.recompute_budget."""

    def copy_of(self, name: str) -> int:
        """Which of the copies of a parameter or buffer that several stages of a pipeline hold this rank has."""
        return self.pipeline.copy_of(name) if self.pipeline is not None else 0

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Run one forward and backward inside; gradients are exchanged when the plan wants them to be.

        ZeRO-2 and 3 scatter the gradients of every micro-batch, so that no rank holds them whole;
        ZeRO-0 and 1 keep them whole and exchange the sum with the last. After an error inside that came to all
        ranks alike, the next step can begin afresh: clear the gradients.
        """
        self.exchange_gradients(last=last)
        if last:
            self.average.expect()
        try:
            yield
            if last:
                self.average.finish()
        except BaseException:
            self.forget_step()
            raise

    def watched(self) -> AbstractContextManager[None]:
        """While it is entered, the time in which layers or sequences in pieces wait for other ranks is communication.

        That of compiled blocks is not seen, for they call the exchanges of the backend themselves.
        """
        if (self.split is None and self.context is None) or self.plan.compile:
            return nullcontext()
        return waits_within(functools.partial(timed, "communication"))

    def forget_step(self) -> None:
        """Drop whatever a broken forward or backward left under way."""
        self.average.forget()
        if self.sharded is not None:
            forget_iteration(self.sharded)

    def rest(self) -> None:
        """Free what forwards without a backward have left gathered, so that the model holds its pieces again."""
        if isinstance(self.sharded, nn.Module):
            for module in self.sharded.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def exchange_gradients(self, *, last: bool) -> None:
        """Set what the coming backward does with its gradients."""
        self.average.enabled = last
        if self.sharded is not None:
            self.sharded.set_requires_gradient_sync(last or self.plan.zero >= 2)
            self.sharded.set_requires_all_reduce(last)
            # Parameters that stay gathered between micro-batches need not be gathered again for the next.
            self.sharded.set_reshard_after_backward(last or self.plan.zero == 3)
            self.sharded.set_is_last_backward(last)


def attach(model: nn.Module, spread: Spread) -> None:
    model.__dict__[_ATTRIBUTE] = spread


def is_spread(model: nn.Module) -> bool:
    return _ATTRIBUTE in model.__dict__


def spread_of(model: nn.Module) -> Spread:
    """The Spread of a model that went through `parallelize`; PlanError for another."""
    spread = model.__dict__.get(_ATTRIBUTE)
    if not isinstance(spread, Spread):
        raise PlanError(
            f"{type(model).__name__} was not spread over a mesh. "
            "Call `model = parallelize(model, mesh, plan)` before you make the optimizer and the engine."
        )
    return spread


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """For a hand-written loop: backwards inside only add to the gradients; the next one outside exchanges them."""
    spread = spread_of(model)
    try:
        with spread.micro_batch(last=False):
            yield
    finally:
        spread.exchange_gradients(last=True)


def num_parameters(model: nn.Module) -> int:
    """The number of trained and fixed numbers of the whole model, wherever its parts are; tied ones once."""
    pipeline = spread_of(model).pipeline if is_spread(model) else None
    whole = model if pipeline is None else pipeline.shadow.model
    return sum(parameter.numel() for parameter in whole.parameters())


def whole_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that every data-parallel rank holds whole: tensor-parallel ranks may hold parts of one."""
    return [parameter for parameter in model.parameters() if not is_sharded(parameter)]
