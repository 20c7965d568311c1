"""Exchanges of context-parallel ranks: round the ring, and between contiguous and balanced layouts of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainfleet.stopwatch import timed


class Passing:
    """Tensors on their way to the next rank of the ring while those of the one before come in."""

    def __init__(self, tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        rank, size = group.rank(), group.size()
        self._like = tensors
        # One message; it is held until it has been sent.
        self._sent = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._received = torch.empty_like(self._sent)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, group=group, group_peer=(rank + 1) % size),
                dist.P2POp(dist.irecv, self._received, group=group, group_peer=(rank - 1) % size),
            ]
        )

    def wait(self) -> list[Tensor]:
        """What came from the rank before, shaped as what was sent."""
        with timed("communication"):
            for work in self._works:
                work.wait()
        parts = torch.split(self._received, [tensor.numel() for tensor in self._like])
        return [part.view(tensor.shape) for part, tensor in zip(parts, self._like)]


def to_balanced(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Of sequences in 2n half-pieces, rank r of n holds (2r, 2r + 1) along dim -2; now it gets (r, 2n - 1 - r).

    Under a causal mask each rank then has the same work. Differentiable.
    """
    return _moved(tensors, group, False)


def from_balanced(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """The reverse of `to_balanced`."""
    return _moved(tensors, group, True)


def _moved(tensors: Sequence[Tensor], group: dist.ProcessGroup, back: bool) -> list[Tensor]:
    return list(_Moved.apply(group, back, *tensors))  # type: ignore[no-untyped-call]


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, back: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.back = group, back
        return _move(tensors, group, back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_move(grads, ctx.group, not ctx.back)


def _move(tensors: Sequence[Tensor], group: dist.ProcessGroup, back: bool) -> tuple[Tensor, ...]:
    """One message to each rank that gets a half, with the halves of all tensors."""
    rank, size = group.rank(), group.size()
    held, wanted = (_balanced, _contiguous) if back else (_contiguous, _balanced)
    owner = {half: each for each in range(size) for half in wanted(each, size)}
    halves = [tensor.chunk(2, -2) for tensor in tensors]
    lengths = [pair[0].numel() for pair in halves]
    # Both sides know the order of what travels between them: by destination, then by number of the half.
    order = sorted(range(2), key=lambda i: (owner[held(rank, size)[i]], held(rank, size)[i]))
    sent = torch.cat([pair[i].reshape(-1) for i in order for pair in halves])
    source = {half: each for each in range(size) for half in held(each, size)}
    coming = sorted(wanted(rank, size), key=lambda half: (source[half], half))
    received = torch.empty_like(sent)
    counts_in = [sum(lengths) * sum(source[half] == each for half in coming) for each in range(size)]
    counts_out = [sum(lengths) * sum(owner[half] == each for half in held(rank, size)) for each in range(size)]
    with timed("communication"):
        dist.all_to_all_single(received, sent, counts_in, counts_out, group=group)
    parts = dict(zip(coming, torch.split(received, sum(lengths))))
    split = {half: torch.split(part, lengths) for half, part in parts.items()}
    return tuple(
        torch.cat([split[half][i].view(halves[i][0].shape) for half in wanted(rank, size)], -2)
        for i in range(len(tensors))
    )


def _contiguous(rank: int, size: int) -> tuple[int, int]:
    return 2 * rank, 2 * rank + 1


def _balanced(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


class _Traded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup, cut: int, joined: int) -> Tensor:
        ctx.group, ctx.cut, ctx.joined = group, cut, joined
        return _trade(tensor, group, cut, joined)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _trade(grad, ctx.group, ctx.joined, ctx.cut), None, None, None


def traded(tensor: Tensor, group: dist.ProcessGroup, *, cut: int, joined: int) -> Tensor:
    """A piece along dim `joined` becomes one along dim `cut`, which must be divisible. Differentiable."""
    result: Tensor = _Traded.apply(tensor, group, cut, joined)  # type: ignore[no-untyped-call]
    return result


def _trade(tensor: Tensor, group: dist.ProcessGroup, cut: int, joined: int) -> Tensor:
    sent = torch.stack(tensor.chunk(group.size(), cut)).contiguous()
    received = torch.empty_like(sent)
    with timed("communication"):
        dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(0), joined)
