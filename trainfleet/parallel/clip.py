"""The norm of the gradients over the whole mesh, and clipping by it (Pascanu et al., arXiv:1211.5063)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainfleet.comm.group import Group


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The pieces of the gradients that this rank holds, as plain tensors that share their memory."""
    return [
        parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        for parameter in parameters
        if parameter.grad is not None
    ]


def gradient_norm(parameters: Sequence[nn.Parameter], shard_group: Group) -> Tensor:
    """The Euclidean norm of all gradients, the same float64 scalar on every rank; inf or nan if any element is.

    Squares of sharded gradients are summed over `shard_group`; whole ones, equal on all ranks, count once.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    sharded = [p for p in with_gradient if isinstance(p.grad, DTensor)]
    whole = [p for p in with_gradient if not isinstance(p.grad, DTensor)]
    square = _sum_of_squares(local_gradients(sharded))
    if shard_group.size > 1:
        device = local_gradients(with_gradient)[0].device if with_gradient else torch.device("cpu")
        square = square.to(device)
        shard_group.all_reduce_(square).wait()
    return (square + _sum_of_squares(local_gradients(whole)).to(square.device)).sqrt()


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    norms = torch._foreach_norm(gradients)
    return torch.stack([norm.to(gradients[0].device) for norm in norms]).double().square().sum()


def scale_gradients_(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply every gradient in place; a factor of 1 costs nothing."""
    if factor != 1.0 and (gradients := local_gradients(parameters)):
        torch._foreach_mul_(gradients, factor)
