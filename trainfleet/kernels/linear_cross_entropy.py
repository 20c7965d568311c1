"""The last linear layer and the cross-entropy in one, which never holds the logits of more than a few tokens.

Of N tokens, width D and a vocabulary of V, logits are N x V numbers, and a plain loss holds them several times over.
Here a stretch of tokens at a time goes all the way: its logits, its part of the loss, and at once the gradients

    dlogits = softmax(logits) - onehot(target)    dhidden = dlogits W    dW += dlogits^T hidden

which backward only multiplies by what it is given. The same products as in the plain form, no more. The idea is that of
Hsu et al. (Liger Kernel, arXiv:2410.10989) and Wijmans et al. (Cut Cross-Entropy, arXiv:2411.09009).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional

from trainfleet.errors import DataError
from trainfleet.loss import LossSum

CHUNK_BYTES = 16 << 20
"""Float32 logits held at a time. On a CPU smaller stretches make slower products, larger ones leave its caches."""
LEAST_ROWS = 256
"""Tokens in a stretch, however large the vocabulary: each stretch goes once through all of the weight's gradient."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    rows: int | None = None,
) -> LossSum:
    """The sum of -log softmax(hidden @ weight.T + bias)[target] over all tokens, and their number.

    `hidden` is [..., D] and `targets` [...] (int64); `weight` [V, D] and `bias` [V] are those of the last layer. A
    target of `ignore_index` does not count. Products are in the dtype of autocast, or of the arguments; the softmax,
    the loss and the sum of the weight's gradient over stretches in float32 or wider. A stretch has `rows`
    tokens; None takes as many as have 16 MiB of logits, and no fewer than 256. Call it inside of the model, where
    sharded weights are gathered. Gradients once, not of gradients.
    Raises DataError where shapes do not fit or a target is outside of the vocabulary.
    """
    if any(isinstance(each, DTensor) for each in (hidden, weight, targets)):
        # In pieces over ranks: torch's own functions, which those who split tensors know, hold the logits of a piece.
        logits = functional.linear(hidden, weight, bias).flatten(0, -2)
        total = functional.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction="sum")
        return LossSum(total, (targets != ignore_index).sum())
    _refuse_misfits(hidden, weight, targets, ignore_index)
    rows = rows or max(LEAST_ROWS, CHUNK_BYTES // (4 * weight.shape[0]))
    total = _Fused.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.reshape(-1), ignore_index, rows)  # type: ignore[no-untyped-call]
    return LossSum(total, (targets != ignore_index).sum())


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, rows: int
    ) -> Tensor:
        kind = hidden.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        wide = torch.promote_types(narrow, torch.float32)
        with torch.autocast(kind, enabled=False):
            w, b = weight.to(narrow), None if bias is None else bias.to(narrow)
            wants = ctx.needs_input_grad
            d_hidden = torch.empty_like(hidden) if wants[0] else None
            d_weight = torch.zeros_like(weight, dtype=wide) if wants[1] else None
            d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wants[2] else None
            total = hidden.new_zeros((), dtype=wide)
            for first in range(0, len(hidden), rows):
                part = slice(first, first + rows)
                h, target = hidden[part].to(narrow), targets[part, None]
                counts = target != ignore_index
                place = target.where(counts, 0)
                logits = torch.nn.functional.linear(h, w, b).to(wide)
                largest = logits.logsumexp(1, keepdim=True)
                total += ((largest - logits.gather(1, place)) * counts).sum()
                if d_hidden is None and d_weight is None and d_bias is None:
                    continue
                d_logits = logits.sub_(largest).exp_()
                d_logits.scatter_add_(1, place, -torch.ones_like(largest))
                d_logits *= counts
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
                d_narrow = d_logits.to(narrow)
                if d_hidden is not None:
                    d_hidden[part] = d_narrow @ w
                if d_weight is not None:
                    _add_product(d_weight, d_narrow, h)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = (each if each is None else each * gradient for each in ctx.saved_tensors)
        of_weight, of_bias = ctx.dtypes
        return (
            d_hidden,
            d_weight if d_weight is None else d_weight.to(of_weight),
            d_bias if d_bias is None else d_bias.to(of_bias),
            None,
            None,
            None,
        )


def _add_product(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """total += d_logits^T hidden, without a second matrix of that size where dtypes allow."""
    if total.dtype == d_logits.dtype:
        total.addmm_(d_logits.T, hidden)
    else:
        total += d_logits.T @ hidden


def _refuse_misfits(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> None:
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[1:]:
        raise DataError(
            f"hidden is {list(hidden.shape)}, weight {list(weight.shape)} and targets {list(targets.shape)}; they must "
            "be [..., D], [V, D] and [...]."
        )
    if hidden.device.type == "cpu" and targets.numel() and not torch.compiler.is_compiling():
        # Elsewhere the look would wait for the device; there the kernel itself stops at such a target.
        counted = targets[targets != ignore_index]
        if counted.numel() and not (int(counted.min()) >= 0 and int(counted.max()) < weight.shape[0]):
            raise DataError(
                f"Targets go from {int(counted.min())} to {int(counted.max())}, but the vocabulary has "
                f"{weight.shape[0]} entries, 0 to {weight.shape[0] - 1}. Look at the data, or mark what does not count "
                f"with {ignore_index}."
            )
