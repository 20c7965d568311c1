"""Convolutions on pieces: split by the channels they give, by those they take, or by groups.

N samples, C channels; what follows the channels are places. A weight [out, in / groups, ...], of a transposed one
[in, out / groups, ...]:

    groups   weight in pieces of   takes        gives
    1        out                   all          its channels
    1        in                    its channels a part of each number, which are summed; then comes the bias
    many     groups                its channels its channels
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from trainfleet.parallel.tensor.exchange import local_of, placed

Whole = Callable[..., Any]


def convolution(function: Callable[..., Tensor], options: tuple[str, ...], out_dim: int) -> Callable[..., Any]:
    """The rule of a function that takes (input, weight, bias, `options` …); its weight gives along `out_dim`."""

    def on_pieces(
        mesh: DeviceMesh,
        whole: Whole,
        input: DTensor,
        weight: DTensor,
        bias: DTensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        named = {**dict(zip(options, args)), **kwargs}

        def local(x: Tensor, w: Tensor, b: Tensor | None, groups: int) -> Tensor:
            return function(x, w, b, **{**named, "groups": groups})

        found = _on_channels(mesh, local, input, weight, bias, named.get("groups", 1), out_dim=out_dim)
        return whole(input, weight, bias, **named) if found is None else found

    return on_pieces


def _on_channels(
    mesh: DeviceMesh,
    local: Callable[..., Tensor],
    input: DTensor,
    weight: DTensor,
    bias: DTensor | None,
    groups: int,
    *,
    out_dim: int,
) -> DTensor | None:
    """None where the channels are not dealt out evenly."""
    channels = input.ndim - weight.ndim + 1  # 0 where there is no dimension of samples
    lies, size = weight.placements[0], mesh.size()
    if channels not in (0, 1) or (isinstance(lies, Shard) and weight.shape[lies.dim] % size):
        return None
    own, parts = Shard(channels), Shard(0)
    if groups > 1:
        is_split = lies == parts or (lies.is_replicate() and input.placements[0] == own)
        if groups % size or not is_split:
            return None
        pieces = (local_of(placed(each, parts)) for each in (weight, bias) if each is not None)
        w, b = next(pieces), next(pieces, None)
        return _given(local(local_of(placed(input, own)), w, b, groups // size), mesh, own)
    if lies == Shard(out_dim):
        x = local_of(placed(input, Replicate()), Partial())
        b = None if bias is None else local_of(placed(bias, parts))
        return _given(local(x, local_of(weight), b, 1), mesh, own)
    if lies != Shard(1 - out_dim):
        return None
    part = local(local_of(placed(input, own)), local_of(weight), None, 1)
    summed = placed(DTensor.from_local(part.contiguous(), mesh, [Partial()], run_check=False), Replicate())
    if bias is None:
        return summed
    each = bias.to(summed.dtype).view(-1, *[1] * (weight.ndim - 2))
    result = summed + each
    assert isinstance(result, DTensor)
    return result


def _given(local: Tensor, mesh: DeviceMesh, lies: Shard) -> DTensor:
    return DTensor.from_local(local.contiguous(), mesh, [lies], run_check=False)


_PLAIN = ("stride", "padding", "dilation", "groups")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")

CONVOLUTIONS: dict[Any, Callable[..., Any]] = {
    **{each: convolution(each, _PLAIN, 0) for each in (torch.conv1d, torch.conv2d, torch.conv3d)},
    **{
        each: convolution(each, _TRANSPOSED, 1)
        for each in (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
    },
}
"""They get (mesh, compute whole, arguments of the function …)."""
