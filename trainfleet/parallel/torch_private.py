"""What we need of torch that has no public name, and what differs between its versions: all of it, here.

Tested with torch 2.13 (CPU) and 2.11 (CUDA).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr as adjusted_muon_rate
from torch.optim._muon import _zeropower_via_newtonschulz as orthogonalise
from torch.utils._python_dispatch import _disable_current_modes as outside_modes

__all__ = [
    "adjusted_muon_rate",
    "forget_iteration",
    "gathered_parameters",
    "offsets_in_whole",
    "orthogonalise",
    "outside_modes",
    "reduce_unused_gradients",
    "with_local",
]


def _sharded_parameters(root: FSDPModule) -> Iterator[Any]:
    assert isinstance(root, nn.Module)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # before torch 2.13 there was one
                groups = [state._fsdp_param_group] if state._fsdp_param_group else []
            for group in groups:
                yield from group.fsdp_params


def gathered_parameters(root: FSDPModule) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(sharded, gathered) of every sharded parameter that has been gathered at least once.

    Gradients appear on the gathered one. It is the same object each time; its storage comes and goes.
    """
    return [
        (each.sharded_param, each._unsharded_param)
        for each in _sharded_parameters(root)
        if hasattr(each, "_unsharded_param")
    ]


def reduce_unused_gradients(root: FSDPModule) -> None:
    """Exchange zeros for parameters that backward did not reach, so that ranks may differ in which those are."""
    if hasattr(root, "set_reduce_scatter_unused_params"):  # since torch 2.13
        root.set_reduce_scatter_unused_params(True)


def forget_iteration(root: FSDPModule) -> None:
    """After an error in forward or backward: nothing is under way or gathered, and no gradient accumulates."""
    if root._get_fsdp_state()._is_root is None:
        return  # it has not run yet
    if hasattr(root, "reset_iter_state"):  # since torch 2.13
        root.reset_iter_state()
    for each in _sharded_parameters(root):
        each.sharded_param.grad = None
        if hasattr(each, "_unsharded_param"):
            each._unsharded_param.grad = None  # torch says that it discards it too, but does not


def with_local(array: DTensor, local: Tensor) -> DTensor:
    """A DTensor like `array` whose piece is `local`, which may rest on another device than the mesh."""
    return DTensor(local, array._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def offsets_in_whole(array: DTensor) -> tuple[int, ...]:
    """Where this rank's piece of a DTensor begins in the whole."""
    mesh = array.device_mesh
    key = (array.shape, mesh.shape, tuple(mesh.get_coordinate() or ()), array.placements)
    if key not in _OFFSETS:  # every save asks for each tensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offsets = compute_local_shape_and_global_offset(array.shape, mesh, array.placements)
        _OFFSETS[key] = tuple(offsets)
    return _OFFSETS[key]


_OFFSETS: dict[Any, tuple[int, ...]] = {}
"""By all that they depend on: shape of the whole and of the mesh, this rank's place in it, placements."""
