"""Exchanges inside a region: from one placement of a DTensor to another, forward and backward."""

from __future__ import annotations

import functools

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate


def placed(array: DTensor, placement: Placement) -> DTensor:
    """`array` placed so over its one axis; its gradient comes back as `array` was placed.

    What is exchanged is contiguous: torch 2.13 gives the result of an exchange the strides of what went in, but lays
    it out anew, and a view in backward then fails.
    """
    if tuple(array.placements) == (placement,):
        return array
    laid_out = array if array.is_contiguous() else array.contiguous()
    assert isinstance(laid_out, DTensor)
    result = laid_out.redistribute(placements=[placement])
    if result.requires_grad:
        result.register_hook(functools.partial(_returned, placement))  # type: ignore[no-untyped-call]
    return result


def local_of(array: DTensor, grad_placement: Placement | None = None) -> Tensor:
    """This rank's piece; `grad_placement` says what its gradient is a piece of, if not of an equal placement."""
    local = array.to_local(grad_placements=None if grad_placement is None else [grad_placement])
    if local.requires_grad:
        local.register_hook(_contiguous)  # type: ignore[no-untyped-call]
    return local


def whole_of(array: DTensor) -> Tensor:
    """The whole, on every rank; gradients are equal on all of them."""
    return local_of(placed(array, Replicate()))


def _returned(placement: Placement, gradient: Tensor) -> Tensor:
    """Placed as what it is the gradient of: torch 2.13 cannot turn a sum into the part of a mean."""
    gradient = gradient.contiguous()
    return placed(gradient, placement) if isinstance(gradient, DTensor) else gradient


def _contiguous(gradient: Tensor) -> Tensor:
    return gradient.contiguous()
