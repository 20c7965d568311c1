"""Between plain tensors, DTensors of some axes and those of the whole region: there and back, with their gradients.

What is plain is equal on all context-parallel ranks, and its gradient is the mean of what they have: so it is right for
parameters, whose gradients are averaged over those ranks too, and for what is computed from them. Over the axis tp
nothing is averaged afterwards: gradients of what is plain are whole, and equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from trainfleet.parallel.tensor.exchange import placed, whole_of

AXIS = "cp"


def lifted(tensor: Any, mesh: DeviceMesh) -> Any:
    """`tensor` as a DTensor of `mesh`: plain ones, and those of some of its axes, are copies along the others."""
    if not isinstance(tensor, Tensor) or (isinstance(tensor, DTensor) and tensor.device_mesh == mesh):
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Lift.apply(tensor, mesh)  # type: ignore[no-untyped-call]
    return _lift(tensor, mesh)


def lowered(tensor: Any, mesh: DeviceMesh) -> Any:
    """A DTensor of more axes as one of `mesh`, whole along the others, along which gradients are equal."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh == mesh:
        return tensor
    kept = names(mesh)
    wanted = [
        placement if name in kept else Replicate()
        for name, placement in zip(names(tensor.device_mesh), tensor.placements)
    ]
    settled = placed(tensor, *wanted)
    placements = [placement for name, placement in zip(names(tensor.device_mesh), wanted) if name in kept]
    return DTensor.from_local(
        settled.to_local(), mesh, placements, run_check=False, shape=tensor.shape, stride=settled.stride()
    )


def plain_of(tensor: Any) -> Any:
    """The whole of a DTensor on every rank, whatever the ranks then do with it: their gradients are averaged."""
    if not isinstance(tensor, DTensor):
        return tensor
    if AXIS not in names(tensor.device_mesh):
        return whole_of(tensor)
    whole = placed(tensor, *[Replicate()] * tensor.device_mesh.ndim)
    if whole.requires_grad and torch.is_grad_enabled():
        return _Plain.apply(whole)  # type: ignore[no-untyped-call]
    return whole.to_local()


def names(mesh: DeviceMesh) -> tuple[str, ...]:
    return tuple(mesh.mesh_dim_names or ())


class _Lift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        ctx.placements = tensor.placements if isinstance(tensor, DTensor) else ()
        return _lift(tensor, mesh)

    @staticmethod
    def backward(ctx: Any, grad: DTensor) -> Any:
        own = dict(zip(names(ctx.mesh), ctx.placements)) if ctx.mesh is not None else {}
        axes = names(grad.device_mesh)
        wanted = [_gradient_of(axis, own, placement) for axis, placement in zip(axes, grad.placements)]
        laid_out = grad.contiguous()
        assert isinstance(laid_out, DTensor)
        local = placed(laid_out, *wanted).to_local()
        if AXIS in axes and AXIS not in own and wanted[axes.index(AXIS)].is_partial():
            local = local * grad.device_mesh.size(axes.index(AXIS))  # a sum of parts as a mean
        if ctx.mesh is None:
            return local, None
        placements = [placement for axis, placement in zip(axes, wanted) if axis in own]
        lain = DTensor.from_local(local, ctx.mesh, placements, run_check=False, shape=grad.shape, stride=grad.stride())
        return lain, None


def _gradient_of(axis: str, own: dict[str, Placement], placement: Placement) -> Placement:
    """How the gradient of what was lifted is to lie along `axis`, where it lies as `placement` now."""
    if axis in own:
        return own[axis]
    if axis == AXIS and placement.is_partial("sum"):
        return placement
    return Replicate()


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: DTensor) -> Tensor:
        ctx.mesh = whole.device_mesh
        return whole.to_local().view_as(whole.to_local())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mesh: DeviceMesh = ctx.mesh
        copies: list[Placement] = [Replicate()] * mesh.ndim
        axis = names(mesh).index(AXIS)
        parts = list(copies)
        parts[axis] = Partial()
        array = DTensor.from_local(grad.contiguous() / mesh.size(axis), mesh, parts, run_check=False)
        return array.redistribute(placements=copies)


def _lift(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    if not isinstance(tensor, DTensor):
        return DTensor.from_local(tensor.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    own = dict(zip(names(tensor.device_mesh), tensor.placements))
    placements: Sequence[Placement] = [own.get(axis, Replicate()) for axis in names(mesh)]
    return DTensor.from_local(
        tensor.to_local().detach(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
