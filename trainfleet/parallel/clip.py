"""The norm of the gradients over the whole mesh, and clipping by it (Pascanu et al., arXiv:1211.5063)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainfleet.comm.group import Group
from trainfleet.parallel.layout import is_sharded, is_split_over

_LONG = 1 << 16
_ROW = 1 << 12


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The pieces of the gradients that this rank holds, as plain tensors that share their memory."""
    sharded, whole = _sharded_and_whole(parameters)
    return sharded + whole


def gradient_norm(
    parameters: Iterable[nn.Parameter],
    shard_group: Group,
    tensor_group: Group | None = None,
    expert_group: Group | None = None,
) -> Tensor:
    """The Euclidean norm of all gradients, the same float64 scalar on every rank; inf or nan if any element is.

    Squares of sharded gradients are summed over `shard_group`, of split layers over `tensor_group` too, of
    experts that are dealt out over `expert_group`; whole ones, equal on all ranks, count once.
    """
    if expert_group is not None:
        parameters = list(parameters)
        dealt_out = norm_of_pieces(local_gradients(p for p in parameters if is_split_over(p, "ep")), expert_group)
        others = [p for p in parameters if not is_split_over(p, "ep")]
        norm = gradient_norm(others, shard_group, tensor_group)
        return torch.hypot(norm, dealt_out.to(norm.device))
    if tensor_group is not None:
        parameters = list(parameters)
        split = [p for p in parameters if is_split_over(p, "tp")]
        others = [p for p in parameters if not is_split_over(p, "tp")]
        square = gradient_norm(split, shard_group).square()
        if split:
            square = square.to(split[0].device)
        tensor_group.all_reduce_(square).wait()
        return (square + gradient_norm(others, shard_group).square().to(square.device)).sqrt()
    sharded, whole = _sharded_and_whole(parameters)
    square = _sum_of_squares(sharded)
    if shard_group.size > 1:
        held = sharded or whole
        square = square.to(held[0].device if held else "cpu")
        shard_group.all_reduce_(square).wait()
    return (square + _sum_of_squares(whole).to(square.device)).sqrt()


def norm_of_pieces(pieces: Iterable[Tensor], group: Group) -> Tensor:
    """The Euclidean norm of what the ranks of `group` hold in parts, the same float64 scalar on each of them."""
    held = list(pieces)
    square = _sum_of_squares(held)
    if group.size > 1:
        square = square.to(held[0].device if held else "cpu")
        group.all_reduce_(square).wait()
    return square.sqrt()


@torch.no_grad()  # to_local() of what no gradient flows through costs a tenth
def _sharded_and_whole(parameters: Iterable[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's pieces of sharded gradients, and the gradients that it holds whole."""
    sharded: list[Tensor] = []
    whole: list[Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            (sharded if is_sharded(gradient) else whole).append(gradient.to_local())
        elif gradient is not None:
            whole.append(gradient)
    return sharded, whole


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    long = [gradient for gradient in gradients if gradient.device.type == "cpu" and gradient.numel() > _LONG]
    others = [gradient for gradient in gradients if gradient.device.type != "cpu" or gradient.numel() <= _LONG]
    norms = [*(torch._foreach_norm(others) if others else ()), *map(_norm_of_long, long)]
    return torch.stack([norm.to(gradients[0].device, torch.float64) for norm in norms]).square().sum()


def _norm_of_long(gradient: Tensor) -> Tensor:
    """In rows: the CPU adds squares one after the other in float32, and is off by 1.6 % after 30 million.

    Clipping would depend on how a gradient is sharded. Rows take no longer.
    """
    flat = (torch.view_as_real(gradient) if gradient.is_complex() else gradient).reshape(-1)
    end = len(flat) // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:end].view(-1, _ROW), dim=1).double().norm()
    return torch.hypot(rows, flat[end:].double().norm())


def scale_gradients_(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply every gradient in place; a factor of 1 costs nothing."""
    if factor != 1.0 and (gradients := local_gradients(parameters)):
        torch._foreach_mul_(gradients, factor)
