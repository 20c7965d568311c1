"""Attention to a block of keys, with the logarithm of its sum of exponentials, and its gradient under that of all keys.

Legend: ... batch and H heads, T queries, S keys of the block, D width of a head. Outputs of blocks are joined by
`join` (online softmax: Milakov and Gimelshein, arXiv:1805.02867; Dao et al., FlashAttention, arXiv:2205.14135).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainfleet.parallel.torch_private import flash_attention, flash_attention_backward, has_flash_attention

_MOST_SCORES = 1 << 24
"""Written-out scores at a time: 64 MiB of float32."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(output [..., T, D] in the dtype of q, lse [..., T] in float32 or wider).

    `mask` is as torch's: bool (True: attend) or numbers that are added. Where nothing may be attended to, the output is
    0 and lse -inf. `causal` needs T = S.
    """
    k, v = _for_heads(q, k), _for_heads(q, v)
    if mask is None and has_flash_attention(q, k, v):
        return flash_attention(q, k, v, causal=causal, scale=scale)
    outputs, sums = [], []
    for rows in _rows(q, k):
        scores = _scores(q[..., rows, :], k, _mask_of(mask, rows), _first(rows, causal), scale)
        lse = scores.logsumexp(-1)
        weights = (scores - _finite(lse)[..., None]).exp()
        outputs.append((weights @ v.to(weights.dtype)).to(q.dtype))
        sums.append(lse)
    return torch.cat(outputs, -2), torch.cat(sums, -1)


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    grad_of_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through this block, where `out` and `lse` are those of all keys.

    With `grad_of_mask`, shaped as the mask, what the scores of this block add to its gradient is added to it.
    """
    groups = k.shape[-3] if k.ndim > 2 else 1
    whole_k, whole_v = _for_heads(q, k), _for_heads(q, v)
    if mask is None and has_flash_attention(q, whole_k, whole_v):
        dq, dk, dv = flash_attention_backward(grad, q, whole_k, whole_v, out, lse, causal=causal, scale=scale)
        return dq, _of_groups(dk, groups), _of_groups(dv, groups)
    wide = lse.dtype
    dk, dv = torch.zeros_like(whole_k, dtype=wide), torch.zeros_like(whole_v, dtype=wide)
    parts = []
    for rows in _rows(q, whole_k):
        grad_rows, q_rows = grad[..., rows, :].to(wide), q[..., rows, :]
        scores = _scores(q_rows, whole_k, _mask_of(mask, rows), _first(rows, causal), scale)
        weights = (scores - _finite(lse[..., rows])[..., None]).exp()
        delta = (grad_rows * out[..., rows, :].to(wide)).sum(-1, keepdim=True)
        d_scores = weights * (grad_rows @ whole_v.to(wide).mT - delta)
        dv += weights.mT @ grad_rows
        dk += d_scores.mT @ q_rows.to(wide) * scale
        parts.append((d_scores @ whole_k.to(wide) * scale).to(q.dtype))
        if grad_of_mask is not None:
            target = _mask_of(grad_of_mask, rows)
            assert target is not None
            target += d_scores.sum_to_size(target.shape).to(target.dtype)
    return torch.cat(parts, -2), _of_groups(dk, groups), _of_groups(dv, groups)


def join(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """What attention to both sets of keys gives; `out` is in the dtype of `lse`."""
    joined = torch.logaddexp(lse, block_lse)
    finite = _finite(joined)
    one, other = (lse - finite).exp()[..., None], (block_lse - finite).exp()[..., None]
    return out * one + block_out.to(out.dtype) * other, joined


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, first: int | None, scale: float) -> Tensor:
    """Scaled and masked, in float32 or wider. `first` is the place of the first query among the keys, if causal."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if first is not None:
        queries, keys = scores.shape[-2:]
        later = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(first + 1)
        scores = scores.masked_fill(later, -math.inf)
    return scores


def _finite(lse: Tensor) -> Tensor:
    """0 where there was nothing to attend to: exp(-inf - 0) is then the 0 that it should be."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def _rows(q: Tensor, k: Tensor) -> list[slice]:
    length = q.shape[-2]
    others = max(1, q.numel() // max(1, length * q.shape[-1])) * max(1, k.shape[-2])
    step = max(1, _MOST_SCORES // others)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _first(rows: slice, causal: bool) -> int | None:
    return int(rows.start) if causal else None


def _mask_of(mask: Tensor | None, rows: slice) -> Tensor | None:
    if mask is None or mask.ndim < 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., rows, :]


def _for_heads(q: Tensor, k: Tensor) -> Tensor:
    """Keys (values) of grouped queries, once for each head."""
    if q.ndim < 3 or k.shape[-3] == q.shape[-3]:
        return k
    return k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)


def _of_groups(grad: Tensor, groups: int) -> Tensor:
    if grad.ndim < 3 or grad.shape[-3] == groups:
        return grad
    return grad.view(*grad.shape[:-3], groups, -1, *grad.shape[-2:]).sum(-3)
