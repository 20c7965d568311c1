"""Dispatch: tokens travel to the ranks that hold their experts, and what the experts make of them travels back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainfleet.stopwatch import timed

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(tokens [M, C], experts [M, 1] counted from this rank's first, weights [M, 1] of one) -> [M, C]."""


def dispatched(
    compute: Compute, tokens: Tensor, chosen: Tensor, weights: Tensor, *, num_experts: int, group: dist.ProcessGroup
) -> Tensor:
    """What all experts make of `tokens` [N, C], a collective over `group`, whose ranks hold the experts in turn.

    Token n goes to the experts chosen[n] ([N, K]; `num_experts` and more: to none), weighed by weights[n] ([N, K]). The
    gradient of an expert is the sum over the ranks whose tokens it got. In backward all ranks exchange again, also
    those whose experts got nothing.
    """
    own = num_experts // group.size()
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)  # by expert, and so by rank
    order = order[: int((flat < num_experts).sum())]
    sent = (flat[order] // own).bincount(minlength=group.size())
    received = torch.empty_like(sent)
    with timed("communication"):
        dist.all_to_all_single(received, sent, group=group)
    out, back = sent.tolist(), received.tolist()
    rows = order // chosen.shape[1]
    if torch.is_grad_enabled() and not tokens.requires_grad:
        # Ranks without a token have no other reason to take part in backward.
        tokens = tokens.detach().requires_grad_()
    arrived = _Exchange.apply(tokens[rows], out, back, group)  # type: ignore[no-untyped-call]
    experts = _exchange(flat[order] % own, out, back, group)
    made = arrived
    if len(arrived):
        ones = torch.ones(len(arrived), 1, dtype=weights.dtype, device=tokens.device)
        made = compute(arrived, experts[:, None], ones).to(tokens.dtype)  # one dtype on all ranks
    returned = _Exchange.apply(made, back, out, group)  # type: ignore[no-untyped-call]
    weighed = returned * weights.reshape(-1)[order, None]
    return torch.zeros_like(tokens).index_add(0, rows, weighed.to(tokens.dtype))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(tensor, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(tensor: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The rows that each rank has for this one, in the order of the ranks."""
    result = tensor.new_empty((sum(received), *tensor.shape[1:]))
    with timed("communication"):
        dist.all_to_all_single(result, tensor.contiguous(), list(received), list(sent), group=group)
    return result
