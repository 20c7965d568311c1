"""Exchanges inside a region: from one placement of a DTensor to another, forward and backward."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate

OUTER = threading.local()
"""Its `context` is the Context (of context parallelism) in which this thread computes on pieces; regions ask for it."""


def placed(array: DTensor, *placements: Placement) -> DTensor:
    """`array` placed so over the axes of its mesh; its gradient comes back as `array` was placed.

    What is exchanged is contiguous: torch 2.13 gives the result of an exchange the strides of what went in, but lays
    it out anew, and a view in backward then fails.
    """
    if tuple(array.placements) == placements:
        return array
    laid_out = array if array.is_contiguous() else array.contiguous()
    assert isinstance(laid_out, DTensor)
    result = laid_out.redistribute(placements=placements)
    if result.requires_grad:
        result.register_hook(functools.partial(_returned, placements))  # type: ignore[no-untyped-call]
    return result


def local_of(array: DTensor, *grad_placements: Placement) -> Tensor:
    """This rank's piece; `grad_placements` say what its gradient is a piece of, if not of an equal placement."""
    local = array.to_local(grad_placements=grad_placements or None)
    if local.requires_grad:
        local.register_hook(_contiguous)  # type: ignore[no-untyped-call]
    return local


def whole_of(array: DTensor) -> Tensor:
    """The whole, on every rank; gradients are equal on all of them."""
    return local_of(placed(array, *[Replicate()] * array.device_mesh.ndim))


def gathered(array: DTensor) -> DTensor:
    """The whole on every rank; of the gradient, which ranks have in parts or whole, each gets back its piece."""
    if all(placement.is_replicate() for placement in array.placements):
        return array
    if array.requires_grad and torch.is_grad_enabled():
        return _Gather.apply(array)  # type: ignore[no-any-return,no-untyped-call]
    return placed(array, *[Replicate()] * array.device_mesh.ndim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, array: DTensor) -> DTensor:
        ctx.placements = array.placements
        return placed(array, *[Replicate()] * array.device_mesh.ndim)

    @staticmethod
    def backward(ctx: Any, grad: DTensor) -> Any:
        return placed(grad, *ctx.placements)


def _returned(placements: Sequence[Placement], gradient: Tensor) -> Tensor:
    """Placed as what it is the gradient of: torch 2.13 cannot turn a sum into the part of a mean."""
    gradient = gradient.contiguous()
    return placed(gradient, *placements) if isinstance(gradient, DTensor) else gradient


def _contiguous(gradient: Tensor) -> Tensor:
    return gradient.contiguous()
