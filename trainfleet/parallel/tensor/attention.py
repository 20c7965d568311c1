"""Attention on pieces: each rank computes its heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from trainfleet.parallel.tensor.exchange import local_of, placed


def split_attention(
    mesh: DeviceMesh,
    whole: Callable[..., Any],
    query: DTensor,
    key: DTensor,
    value: DTensor,
    attn_mask: DTensor | None = None,
    dropout_p: float = 0.0,
    **options: Any,
) -> Any:
    """`scaled_dot_product_attention` by heads, whatever came in; on the whole where heads cannot be dealt out.

    Shapes: ... H heads, T queries, S keys, D width of a head. Torch has no rule of its own for the kernel of CPUs.
    """
    if not _has_heads(mesh, query, key, value, attn_mask, options) or dropout_p > 0:
        return whole(query, key, value, attn_mask, dropout_p, **options)
    q, k, v = (_heads(each) for each in (query, key, value))
    mask = None if attn_mask is None else _mask(attn_mask, query.shape[-3])
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, 0.0, **options)
    return DTensor.from_local(mixed, mesh, [Shard(mixed.ndim - 3)], run_check=False)


def _has_heads(
    mesh: DeviceMesh, query: DTensor, key: DTensor, value: DTensor, mask: DTensor | None, options: dict[str, Any]
) -> bool:
    if min(query.ndim, key.ndim, value.ndim) < 4:
        return False
    heads = [each.shape[-3] for each in (query, key, value)]
    if any(number % mesh.size() for number in heads):
        return False
    if len(set(heads)) > 1 and not options.get("enable_gqa"):
        return False
    return mask is None or mask.ndim < 3 or mask.shape[-3] in (1, heads[0])


def _heads(array: DTensor) -> Tensor:
    """The heads of this rank. A copy is cut without an exchange; its gradient is gathered."""
    return local_of(placed(array, Shard(array.ndim - 3)))


def _mask(mask: DTensor, heads: int) -> Tensor:
    """The mask of this rank's heads; of one for all heads, each rank has a part of the gradient."""
    if mask.ndim >= 3 and mask.shape[-3] == heads and heads > 1:
        return _heads(mask)
    return local_of(placed(mask, Replicate()), Partial())
