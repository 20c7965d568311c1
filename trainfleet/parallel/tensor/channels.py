"""Functions that know of no channel but one at a time: norms over samples and places, pools, resampling, padding.

N samples, C channels, c of them on each rank; what follows the channels are places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

from trainfleet.parallel.tensor.exchange import local_of, placed, whole_of

Whole = Callable[..., Any]


def has_own_channels(input: Tensor) -> bool:
    """Whether each rank has as many channels of `input` [N, C, ...] as any other, and all of each."""
    if not isinstance(input, DTensor) or input.device_mesh.ndim != 1 or input.ndim < 2:
        return False
    return input.placements[0] == Shard(1) and input.shape[1] % input.device_mesh.size() == 0


def own(of_channels: Tensor | None, mesh: DeviceMesh) -> Tensor | None:
    """This rank's part [c] of numbers [C], plain or as a DTensor, of which every rank has all."""
    if of_channels is None:
        return None
    if isinstance(of_channels, DTensor):
        return local_of(placed(of_channels, Shard(0)))
    return of_channels.chunk(mesh.size())[mesh.get_local_rank()]


def in_place_of(local: Tensor, input: DTensor) -> DTensor:
    """What was computed from this rank's channels, lying as they do."""
    return DTensor.from_local(local.contiguous(), input.device_mesh, input.placements, run_check=False)


def gathered(mesh: DeviceMesh, *parts: Tensor) -> tuple[Tensor, ...]:
    """Statistics [c] of this rank's channels as those [C] of all; one exchange, without gradients."""
    with torch.no_grad():
        return whole_of(DTensor.from_local(torch.stack(parts), mesh, [Shard(1)], run_check=False)).unbind()


def batch_norm(
    mesh: DeviceMesh,
    whole: Whole,
    input: DTensor,
    running_mean: DTensor | None,
    running_var: DTensor | None,
    weight: DTensor | None = None,
    bias: DTensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Statistics of a channel need no other channel; the running ones are then the same on all ranks again."""
    if not has_own_channels(input):
        return whole(input, running_mean, running_var, weight, bias, training, momentum, eps)
    with torch.no_grad():
        running = [None if each is None else each.to_local() for each in (running_mean, running_var)]
        mean, variance = (None if each is None else _copy(own(each, mesh)) for each in running)
    affine = own(weight, mesh), own(bias, mesh)
    output = functional.batch_norm(local_of(input), mean, variance, *affine, training, momentum, eps)
    if training and mean is not None and variance is not None:
        for each, now in zip(running, gathered(mesh, mean, variance), strict=True):
            assert each is not None
            each.copy_(now)
    return in_place_of(output, input)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def group_norm(
    mesh: DeviceMesh,
    whole: Whole,
    input: DTensor,
    num_groups: int,
    weight: DTensor | None = None,
    bias: DTensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Each rank has whole groups, or all is computed by each."""
    if not has_own_channels(input) or num_groups % mesh.size():
        return whole(input, num_groups, weight, bias, eps)
    affine = own(weight, mesh), own(bias, mesh)
    return in_place_of(functional.group_norm(local_of(input), num_groups // mesh.size(), *affine, eps), input)


def instance_norm(
    mesh: DeviceMesh,
    whole: Whole,
    input: DTensor,
    running_mean: DTensor | None = None,
    running_var: DTensor | None = None,
    weight: DTensor | None = None,
    bias: DTensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not has_own_channels(input) or running_mean is not None or running_var is not None:
        return whole(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    affine = own(weight, mesh), own(bias, mesh)
    return in_place_of(functional.instance_norm(local_of(input), None, None, *affine, use_input_stats, eps=eps), input)


def by_place(function: Callable[..., Any], places: int) -> Callable[..., Any]:
    """The rule of a function that looks at the last `places` dimensions of its first argument, each by itself else."""

    def on_pieces(mesh: DeviceMesh, whole: Whole, input: DTensor, *args: Any, **kwargs: Any) -> Any:
        return _apart(function, places, whole, input, *args, **kwargs)

    return on_pieces


def _apart(function: Callable[..., Any], places: int, whole: Whole, input: DTensor, *args: Any, **kwargs: Any) -> Any:
    lies = input.placements[0]
    at = lies.dim if isinstance(lies, Shard) else input.ndim
    if at >= input.ndim - places or input.shape[at] % input.device_mesh.size():
        return whole(input, *args, **kwargs)
    found = function(local_of(input), *args, **kwargs)
    if isinstance(found, tuple):
        return tuple(in_place_of(each, input) for each in found)
    return in_place_of(found, input)


def bounded(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """The rule of an activation for which DTensors have no backward; `inplace` it is changed as the whole would be."""

    def on_pieces(mesh: DeviceMesh, whole: Whole, input: DTensor, *args: Any, inplace: bool = False, **kw: Any) -> Any:
        if not inplace:
            return _apart(function, 0, whole, input, *args, **kw)
        before = input.clone()
        assert isinstance(before, DTensor)
        return input.copy_(_apart(function, 0, whole, before, *args, **kw))

    return on_pieces


def interpolate(mesh: DeviceMesh, whole: Whole, input: DTensor, *args: Any, **kwargs: Any) -> Any:
    return _apart(functional.interpolate, input.ndim - 2, whole, input, *args, **kwargs)


def pad(mesh: DeviceMesh, whole: Whole, input: DTensor, pad: Any, *args: Any, **kwargs: Any) -> Any:
    return _apart(functional.pad, len(pad) // 2, whole, input, pad, *args, **kwargs)


_POOLS: dict[int, tuple[Any, ...]] = {
    1: (functional.max_pool1d, functional.avg_pool1d, functional.adaptive_avg_pool1d, functional.adaptive_max_pool1d),
    2: (functional.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d),
    3: (functional.max_pool3d, functional.avg_pool3d, functional.adaptive_avg_pool3d, functional.adaptive_max_pool3d),
}

BY_CHANNEL: dict[Any, Callable[..., Any]] = {
    functional.batch_norm: batch_norm,
    functional.group_norm: group_norm,
    functional.instance_norm: instance_norm,
    functional.interpolate: interpolate,
    functional.pad: pad,
    **{
        each: bounded(each)
        for each in (functional.relu6, functional.hardtanh, functional.hardswish, functional.hardsigmoid)
    },
    **{each: by_place(each, places) for places, pools in _POOLS.items() for each in pools},
}
"""They get (mesh, compute whole, arguments of the function …)."""
