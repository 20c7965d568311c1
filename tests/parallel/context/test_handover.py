"""Of sequences in pieces a stage hands on its piece, which is one behind too; gradients come back as they went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.mesh import Mesh
from trainfleet.parallel.context.handover import Handover
from trainfleet.parallel.context.region import Context
from trainfleet.plan import Plan

B, T, C = 2, 6, 4

VALUES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "a sequence": (lambda x, w: x @ w, (B, T // 2, C)),
    "heads": (lambda x, w: (x @ w).unflatten(-1, (2, 2)).transpose(1, 2), (B, 2, T // 2, 2)),
    "samples and positions in one": (lambda x, w: (x @ w).flatten(0, 1), (B * T, C)),
    "one number a sample": (lambda x, w: (x @ w).square().mean((1, 2)), (B,)),
    "a parameter": (lambda x, w: w.exp(), (C, C)),
    "what follows from a parameter, as long as a sequence": (lambda x, w: w.sum() * torch.ones(B, T), (B, T // 2)),
}
"""What crosses a boundary, made of x [B, T, C] and a parameter [C, C], and the shape of what a rank sends of it."""


def given() -> tuple[Tensor, nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(B, T, C, generator=draw), nn.Parameter(torch.randn(C, C, generator=draw))


def after(value: Tensor) -> Tensor:
    """What the stage behind makes of it: the factor of each element is another."""
    return (value.sin() * torch.arange(1.0, value.numel() + 1).view(value.shape)).sum()


def handed_on() -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    with Mesh.from_env(Plan(cp=2)) as mesh:
        for name, (make, _) in VALUES.items():
            x, w = given()
            context = Context(mesh.torch["cp"], "ring")
            (pieces,), length = context.split([x])
            assert length == T
            handover = Handover(context, length)
            value = handover.run(lambda make=make, pieces=pieces, w=w: make(pieces, w))
            sent = handover.leaving(value)
            arrived = sent.detach().requires_grad_()
            whole = handover.arriving(arrived, tuple(value.shape))
            total = handover.whole(handover.run(lambda whole=whole: after(whole)))
            total.backward()
            sent.backward(arrived.grad)
            assert w.grad is not None
            mesh["cp"].all_reduce_(w.grad, op="mean").wait()
            shapes = tuple(sent.shape), handover.shape(tuple(value.shape))
            found[name] = (*shapes, handover.whole(whole).detach(), total.detach(), w.grad)
    return found


def test_ranks_hand_on_pieces_and_get_pieces_of_gradients_back(ranks: RankPools) -> None:
    for found in ranks(2, handed_on):
        for name, (make, piece) in VALUES.items():
            x, w = given()
            value = make(x, w)
            total = after(value)
            total.backward()
            assert w.grad is not None
            shape, said, whole, sum_, gradient = found[name]
            assert shape == said == piece, name
            torch.testing.assert_close(whole, value.detach(), msg=name)
            torch.testing.assert_close(sum_, total.detach(), msg=name)
            torch.testing.assert_close(gradient, w.grad, rtol=1e-4, atol=1e-5, msg=name)


def lengths_seen() -> list[int]:
    """The lengths in whose mode what is recomputed runs, where another micro-batch came between."""
    from trainfleet.parallel.recompute import recompute

    seen: list[int] = []

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert context.mode is not None
            seen.append(context.mode.length)
            return (x * 2).cumsum(1).sin()

    with Mesh.from_env(Plan(cp=2)) as mesh:
        context = Context(mesh.torch["cp"], "ring")
        block = Block()
        block.forward = context.reentering(block.forward)  # type: ignore[method-assign]
        recompute([block])
        w = nn.Parameter(torch.ones(C))
        losses = []
        for length in (T, 2 * T):
            (pieces,), found = context.split([torch.ones(B, length, C)])
            handover = Handover(context, found or 0)
            losses.append(handover.whole(handover.run(lambda pieces=pieces: block(pieces * w).sum())))
        for loss in losses:
            loss.backward()
    return seen


def test_a_block_is_recomputed_on_pieces_of_its_own_length(ranks: RankPools) -> None:
    assert ranks(2, lengths_seen) == [[T, 2 * T, T, 2 * T]] * 2
