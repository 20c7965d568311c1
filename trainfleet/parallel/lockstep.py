"""Lockstep: ranks gather the blocks of a sharded model together, so they must come to them in one order.

A rank that skips a block, or takes another, would wait for ever; or, where shapes agree, compute with the parameters
of a block that it did not ask for. So the first step asks the ranks before each block, and every step compares a
digest of the way that each rank took.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from trainfleet.comm.group import Group
from trainfleet.errors import PlanError
from trainfleet.parallel.randomness import mixed

_END = "the end of forward"


class Lockstep:
    """The way of this rank through the blocks of `model`, from one `start` to the next."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._group = group
        self._way = 0
        blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        self.asks = group.size > 1 and len(blocks) > 1
        """Whether ranks agree before each block is gathered: an exchange each time, for the first step only."""
        for number, (name, module) in enumerate(blocks):
            if name and isinstance(module, nn.Module):
                arrive = torch.compiler.disable(self._arrive(name, number))  # type: ignore[no-untyped-call]
                module.register_forward_pre_hook(arrive, prepend=True)  # before the hook that gathers

    def _arrive(self, name: str, number: int) -> Callable[[nn.Module, Any], None]:
        def arrive(module: nn.Module, args: Any) -> None:
            self._way = mixed(self._way ^ number)
            if self.asks:
                self._agree(name)

        return arrive

    def start(self) -> None:
        self._way = 0

    def end_forward(self) -> None:
        """All blocks that this forward calls have been called."""
        if self.asks:
            self._agree(_END)

    def _agree(self, name: str) -> None:
        names = self._group.exchange(name)
        if len(set(names)) > 1:
            other = next(rank for rank, each in enumerate(names) if each != names[0])
            raise _refusal(f"rank 0 has come to {names[0]} and rank {other} to {names[other]}")

    def numbers(self) -> list[float]:
        """Two numbers to be summed over the ranks; exact in float64 for thousands of them."""
        digest = self._way & 0xFFFFF
        return [float(digest), float(digest * digest)]

    def check(self, total: float, squares: float) -> None:
        """Given the sums over all ranks of `numbers`: PlanError, on all of them, where they took different ways."""
        if int(squares) * self._group.size != int(total) ** 2:
            raise _refusal("in this step they did not")


def _refusal(what: str) -> PlanError:
    return PlanError(
        f"With plan.zero of 1 to 3 all ranks run the same blocks in the same order, but {what}.",
        hint="Skip inside a block, not whole blocks (plan.blocks names larger ones); or run each on every rank and "
        "multiply by 0 what does not count; or set plan.zero=0.",
    )
