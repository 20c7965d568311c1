"""Micro-batches through stages on several ranks: GPipe, and one forward one backward.

GPipe  Huang et al., arXiv:1811.06965: all forwards, then all backwards; a stage keeps all m micro-batches.
1F1B   Narayanan et al., arXiv:1806.03377: stage s of p warms up with p - s - 1 forwards, then takes turns; it
       keeps p - s micro-batches at most. Both idle for (p - 1) / (m + p - 1) of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from trainfleet.comm.group import Group, Links, Work
from trainfleet.errors import PlanError
from trainfleet.loss import LossSum
from trainfleet.mpi.arrays import Array, for_group, like
from trainfleet.mpi.layers import Gradients, Sequential

LossFunction: TypeAlias = Callable[[Array, Any], tuple[LossSum, Array]]
"""The loss of outputs beside targets, and its derivative by the outputs."""
Action: TypeAlias = tuple[Literal["forward", "backward"], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Passed:
    """What came of one batch."""

    loss: LossSum
    """Of all micro-batches, on every rank."""
    gradients: Gradients
    """Of the summed loss, by this stage's parameters."""
    most_held: int
    """Micro-batches whose activations were kept at once."""


def gpipe(rank: int, size: int, count: int) -> list[Action]:
    """What stage `rank` of `size` does with `count` micro-batches."""
    return [("forward", index) for index in range(count)] + [("backward", index) for index in range(count)]


def one_forward_one_backward(rank: int, size: int, count: int) -> list[Action]:
    warm_up = min(count, size - rank - 1)
    actions: list[Action] = [("forward", index) for index in range(warm_up)]
    for index in range(count - warm_up):
        actions += [("forward", warm_up + index), ("backward", index)]
    return actions + [("backward", index) for index in range(count - warm_up, count)]


SCHEDULES = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def run_pipeline(
    stage: Sequential,
    micro_batches: Sequence[tuple[Array, Any]],
    loss_function: LossFunction,
    group: Group,
    schedule: Literal["gpipe", "1f1b"] = "1f1b",
) -> Passed:
    """Forward and backward of all micro-batches, (input, target) each, over the stages that the ranks of `group` hold.

    The first stage reads the inputs, the last one the targets. Nothing is averaged: gradients are those of the sum.
    """
    if schedule not in SCHEDULES:
        raise PlanError(f"The schedule is {schedule!r}; use one of {', '.join(SCHEDULES)}.")
    assert isinstance(group, Links)
    rank, last = group.rank, group.size - 1
    held: dict[int, Any] = {}  # what backward needs, by micro-batch
    derivatives: dict[int, Array] = {}
    sending: list[Work] = []
    loss, gradients, most_held = LossSum(0.0, 0.0), dict[str, Array](), 0
    for action, index in SCHEDULES[schedule](rank, group.size, len(micro_batches)):
        inputs, targets = micro_batches[index]
        if action == "forward":
            y, held[index] = stage.forward(inputs if rank == 0 else receive(group, rank - 1, like_=inputs))
            most_held = max(most_held, len(held))
            if rank == last:
                own, derivatives[index] = loss_function(y, targets)
                loss = loss + own
            else:
                sending += send(group, y, rank + 1)
        else:
            dy = derivatives.pop(index) if rank == last else receive(group, rank + 1, like_=inputs)
            dx, own_gradients = stage.backward(held.pop(index), dy)
            gradients = added(gradients, own_gradients)
            if rank > 0:
                sending += send(group, dx, rank - 1)
    for work in sending:
        work.wait()
    totals = np.array([float(loss.total), float(loss.weight)])
    group.broadcast_(totals, last).wait()
    return Passed(loss=LossSum(float(totals[0]), float(totals[1])), gradients=gradients, most_held=most_held)


def added(total: Gradients, more: Gradients) -> Gradients:
    """Sums by name; what only one of them has stays."""
    return total | {name: total[name] + value if name in total else value for name, value in more.items()}


_LONGEST = 8  # dimensions
_DTYPES = ("float32", "float64", "float16", "int64", "int32", "bfloat16")


def send(group: Group, array: Array, to: int) -> list[Work]:
    """An array of any shape: first dtype and shape, then the numbers."""
    assert isinstance(group, Links)
    held = for_group(array, group)
    held = held if held.flags.c_contiguous else held.copy()
    head = np.zeros(_LONGEST + 2, np.int64)
    head[:2] = _DTYPES.index(str(held.dtype)), held.ndim
    head[2 : 2 + held.ndim] = held.shape
    return [group.send(head, to), group.send(held, to)]


def receive(group: Group, source: int, *, like_: Array) -> Array:
    """What `send` sent, in the library of `like_`."""
    assert isinstance(group, Links)
    head = np.zeros(_LONGEST + 2, np.int64)
    group.recv_(head, source).wait()
    array = np.empty(tuple(head[2 : 2 + head[1]]), _DTYPES[head[0]])
    group.recv_(array, source).wait()
    return like(like_, array)
