"""Attention of sequences in pieces, by the ring or by heads; and by heads over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from trainfleet.errors import PlanError
from trainfleet.parallel.context.exchange import traded
from trainfleet.parallel.context.lift import AXIS, names
from trainfleet.parallel.context.ring import ring_attention
from trainfleet.parallel.tensor.exchange import local_of, placed

Kind = Literal["ring", "all_to_all"]


def attention_on_pieces(
    kind: Kind,
    mesh: DeviceMesh,
    whole: Callable[..., Any],
    query: DTensor,
    key: DTensor,
    value: DTensor,
    attn_mask: DTensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """As torch's, for DTensors of `mesh`, whose axes are cp and, it may be, tp.

    Shapes: [B, H, T, D] queries, [B, G, S, D] keys and values. What cannot be computed so is computed on the whole:
    tensors of other dimensions, lengths or heads that the ranks do not divide, dropout (its mask is one process's).
    """
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if dropout_p > 0 or not _fits(mesh, query, key, value, attn_mask, is_causal, enable_gqa):
        return whole(query, key, value, attn_mask, dropout_p, **options)
    lies = [_lies(axis, query.ndim) for axis in names(mesh)]
    q, k, v = (local_of(placed(each, *lies)) for each in (query, key, value))
    group = mesh.get_group(AXIS)
    if kind == "all_to_all":
        heads = [each.shape[-3] for each in (q, k)]
        _refuse_heads(heads, group.size())
        mask = None if attn_mask is None else _mask_of_heads(mesh, attn_mask, query.shape[-3])
        q, k, v = (traded(each, group, cut=-3, joined=-2) for each in _cast(q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        out = traded(out, group, cut=-2, joined=-3)
    else:
        mask = None if attn_mask is None else _mask_of_rows(mesh, attn_mask, query.shape[-3])
        q, k, v = _cast(q, k, v)
        out = ring_attention(q, k, v, group, mask=mask, causal=is_causal, scale=scale)
    return DTensor.from_local(out, mesh, lies, run_check=False)


def _fits(
    mesh: DeviceMesh, q: DTensor, k: DTensor, v: DTensor, mask: DTensor | None, is_causal: bool, grouped: bool
) -> bool:
    if not (q.ndim == k.ndim == v.ndim == 4 and q.shape[0] == k.shape[0] == v.shape[0]):
        return False
    if k.shape[1:3] != v.shape[1:3] or k.shape[-1] != q.shape[-1]:
        return False
    if k.shape[1] != q.shape[1] and not (grouped and q.shape[1] % k.shape[1] == 0):
        return False
    sizes = dict(zip(names(mesh), mesh.shape))
    if q.shape[2] % sizes[AXIS] or k.shape[2] % sizes[AXIS]:
        return False
    if q.shape[1] % sizes.get("tp", 1) or k.shape[1] % sizes.get("tp", 1):
        return False
    if is_causal and (mask is not None or q.shape[2] != k.shape[2]):
        return False
    if mask is None:
        return True
    wanted = (*q.shape[:3], k.shape[2])
    return mask.ndim <= 4 and all(have in (1, want) for have, want in zip(reversed(mask.shape), reversed(wanted)))


def _lies(axis: str, ndim: int) -> Placement:
    """The sequence is in pieces over cp, the heads over tp."""
    return Shard(ndim - 2) if axis == AXIS else Shard(ndim - 3)


def _mask_of_rows(mesh: DeviceMesh, mask: DTensor, heads: int) -> Tensor:
    """The rows of the mask for this rank's queries, with the columns of all keys, for this rank's heads."""
    return _mask(mesh, mask, heads, rows=True)


def _mask_of_heads(mesh: DeviceMesh, mask: DTensor, heads: int) -> Tensor:
    """All of the mask, for the heads that this rank has after the trade."""
    found = _mask(mesh, mask, heads, rows=False)
    if found.ndim >= 3 and found.shape[-3] > 1:
        group = mesh.get_group(AXIS)
        found = found.chunk(group.size(), -3)[group.rank()]
    return found


def _mask(mesh: DeviceMesh, mask: DTensor, heads: int, *, rows: bool) -> Tensor:
    wanted: list[Placement] = []
    gradient: list[Placement] = []
    for axis in names(mesh):
        dim = mask.ndim - (2 if axis == AXIS else 3)
        is_cut = dim >= 0 and mask.shape[dim] > 1 and (rows if axis == AXIS else mask.shape[dim] == heads)
        wanted.append(Shard(dim) if is_cut else Replicate())
        gradient.append(Shard(dim) if is_cut else Partial())
    return local_of(placed(mask, *wanted), *gradient)


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast would do: attention is one of its products."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def _refuse_heads(heads: list[int], size: int) -> None:
    for number, what in zip(heads, ("heads", "heads of keys and values")):
        if number % size:
            raise PlanError(
                f"plan.cp_attention is 'all_to_all', which deals out heads, but plan.cp={size} does not divide the "
                f"{number} {what} that a rank has. Use plan.cp_attention=ring, which takes any number, or a cp that "
                f"divides {number}."
            )
