"""Ring attention: each rank keeps its queries, and the keys and values of all ranks come by (Liu et al.,
arXiv:2310.01889).

While a rank attends to one block, the next is on its way. Under a causal mask ranks trade halves of their pieces
first, so that all have the same work: rank r of n takes halves r and 2n - 1 - r of 2n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainfleet.parallel.context.blocks import attend, attend_backward, join
from trainfleet.parallel.context.exchange import Passing, from_balanced, to_balanced


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks of `group`; its output for them.

    q [..., H, T, D] and k, v [..., G, S, D] are this rank's pieces of sequences that the ranks hold in turn, equally
    long on each; G divides H. `mask` has the rows of these queries and the columns of all keys, as torch's does;
    `causal` needs T = S and no mask. Gradients are exact; there is no second derivative.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    is_balanced = causal and q.shape[-2] % 2 == 0
    if is_balanced:
        q, k, v = to_balanced((q, k, v), group)
    out: Tensor = _Ring.apply(q, k, v, mask, group, causal, is_balanced, scale)  # type: ignore[no-untyped-call]
    return from_balanced((out,), group)[0] if is_balanced else out


@dataclass(frozen=True, slots=True)
class _Part:
    """Which of this rank's queries see which keys of a block."""

    queries: slice
    keys: slice
    causal: bool


_ALL = slice(None)


def _part(rank: int, source: int, *, causal: bool, is_balanced: bool, queries: int, keys: int) -> _Part | None:
    """What rank `rank` computes with the block of `source`; None where its queries see none of it."""
    if not causal:
        return _Part(_ALL, _ALL, False)
    if source == rank:
        return _Part(_ALL, _ALL, True)
    if not is_balanced:
        return _Part(_ALL, _ALL, False) if source < rank else None
    if source < rank:  # its first half lies before both of ours, its second behind both
        return _Part(_ALL, slice(0, keys // 2), False)
    return _Part(slice(queries // 2, queries), _ALL, False)  # both of its halves lie between ours


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        group: dist.ProcessGroup,
        causal: bool,
        is_balanced: bool,
        scale: float,
    ) -> Tensor:
        rank, size = group.rank(), group.size()
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        wide = torch.promote_types(q.dtype, torch.float32)
        shape = (*q.shape[:-1], v.shape[-1])
        out = torch.zeros(shape, dtype=wide, device=q.device)
        lse = torch.full(q.shape[:-1], -torch.inf, dtype=wide, device=q.device)
        held = [k, v]
        for step in range(size):
            source = (rank - step) % size
            coming = Passing(held, group) if step < size - 1 else None
            part = _part(rank, source, causal=causal, is_balanced=is_balanced, queries=q.shape[-2], keys=k.shape[-2])
            if part is not None:
                rows, keys = part.queries, part.keys
                columns = _columns(mask, source, k.shape[-2])
                found = attend(
                    q[..., rows, :], held[0][..., keys, :], held[1][..., keys, :], columns, part.causal, scale
                )
                out[..., rows, :], lse[..., rows] = join(out[..., rows, :], lse[..., rows], *found)
            if coming is not None:
                held = coming.wait()
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse, *([] if mask is None else [mask]))
        ctx.group, ctx.causal, ctx.is_balanced, ctx.scale = group, causal, is_balanced, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Keys and values go round once more, and with each block what the ranks add to its gradients."""
        q, k, v, out, lse, *masks = ctx.saved_tensors
        mask = masks[0] if masks else None
        group: dist.ProcessGroup = ctx.group
        rank, size = group.rank(), group.size()
        grad = grad.contiguous()
        dq = torch.zeros_like(q, dtype=lse.dtype)
        of_mask = torch.zeros_like(mask) if mask is not None and ctx.needs_input_grad[3] else None
        held = [k, v]
        sums = [torch.zeros_like(each, dtype=lse.dtype) for each in held]
        leaving: Passing | None = None
        for step in range(size):
            source = (rank - step) % size
            coming = Passing(held, group) if step < size - 1 else None
            part = _part(
                rank, source, causal=ctx.causal, is_balanced=ctx.is_balanced, queries=q.shape[-2], keys=k.shape[-2]
            )
            found = None
            if part is not None:
                rows, keys = part.queries, part.keys
                found = attend_backward(
                    grad[..., rows, :],
                    q[..., rows, :],
                    held[0][..., keys, :],
                    held[1][..., keys, :],
                    out[..., rows, :],
                    lse[..., rows],
                    _columns(mask, source, k.shape[-2]),
                    part.causal,
                    ctx.scale,
                    _columns(of_mask, source, k.shape[-2]),
                )
            if leaving is not None:
                sums = leaving.wait()
            if part is not None and found is not None:
                dq[..., part.queries, :] += found[0]
                sums[0][..., part.keys, :] += found[1]
                sums[1][..., part.keys, :] += found[2]
            leaving = Passing(sums, group)  # after the last step they go home
            if coming is not None:
                held = coming.wait()
        assert leaving is not None
        dk, dv = leaving.wait()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), of_mask, None, None, None, None


def _columns(mask: Tensor | None, source: int, keys: int) -> Tensor | None:
    """A view of the mask's columns for the keys of rank `source`."""
    if mask is None or mask.shape[-1] == 1:
        return mask
    return mask[..., source * keys : (source + 1) * keys]
