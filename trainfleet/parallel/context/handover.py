"""Handover: what the stages of a pipeline give one another of sequences in pieces: this rank's piece of each tensor.

Ranks of equal place on the axis cp talk to each other, so nothing is gathered where one stage ends and the next begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from trainfleet.batch import map_arrays
from trainfleet.parallel.context.lift import lifted, lowered
from trainfleet.parallel.tensor.exchange import local_of, placed, whole_of

if TYPE_CHECKING:
    from trainfleet.parallel.context.region import Context


class Handover:
    """Of one micro-batch with sequences of `length`, on which `context` computes.

    A tensor travels in pieces along its first dimension behind the samples that is as long as the sequence; one
    without such a dimension travels whole. Its gradient comes back in the same way.
    """

    def __init__(self, context: Context, length: int) -> None:
        self._context, self.length = context, length

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """What this rank has of a tensor of shape `whole`."""
        dim = self._dim_of(whole)
        size = self._context.mesh.size()
        return whole if dim is None else (*whole[:dim], whole[dim] // size, *whole[dim + 1 :])

    def leaving(self, tensor: Tensor) -> Tensor:
        """The plain tensor that is sent of `tensor`: a DTensor, or a plain one that is equal on all ranks."""
        array = lifted(lowered(tensor, self._context.mesh), self._context.mesh)
        assert isinstance(array, DTensor)
        return local_of(placed(array, self._placement(tuple(array.shape)))).clone()  # FSDP2 warns of views

    def arriving(self, piece: Tensor, whole: tuple[int, ...]) -> Tensor:
        """The reverse of `leaving`: a DTensor of shape `whole`."""
        return array_of(piece, self._context.mesh, self._placement(whole), whole)

    def run(self, compute: Callable[[], Any]) -> Any:
        """`compute()` on pieces; what it gives stays in pieces."""
        with self._context.on_pieces(self.length):
            return compute()

    def whole(self, nested: Any) -> Any:
        """The same nesting with every DTensor whole, on every rank."""
        return map_arrays(lambda array: whole_of(array) if isinstance(array, DTensor) else array, nested)

    def _dim_of(self, shape: tuple[int, ...]) -> int | None:
        return next((dim for dim in range(1, len(shape)) if shape[dim] == self.length), None)

    def _placement(self, shape: tuple[int, ...]) -> Placement:
        dim = self._dim_of(shape)
        return Replicate() if dim is None else Shard(dim)


def array_of(piece: Tensor, mesh: DeviceMesh, placement: Placement, whole: tuple[int, ...]) -> DTensor:
    """The DTensor of shape `whole` of which this rank of `mesh` (one axis) has `piece`; so it gets its gradient too."""
    stride = torch.empty(whole, device="meta").stride()
    array = DTensor.from_local(
        piece.contiguous(), mesh, [placement], run_check=False, shape=torch.Size(whole), stride=stride
    )
    if array.requires_grad:
        array.register_hook(functools.partial(_returned, placement))  # type: ignore[no-untyped-call]
    return array


def _returned(placement: Placement, gradient: Tensor) -> Tensor:
    """A gradient as the tensor itself lay: sums over ranks are taken before it is sent back."""
    gradient = gradient.contiguous()
    return placed(gradient, placement) if isinstance(gradient, DTensor) else gradient
