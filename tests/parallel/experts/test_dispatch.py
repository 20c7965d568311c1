"""Tokens go to the ranks of their experts and come back weighed, also where an expert gets none or a rank has none."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from rank_pool import RankPools
from torch import Tensor

from trainfleet.parallel.experts.dispatch import dispatched

EXPERTS, WIDTH = 4, 3


def data(rank: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    number = {"plain": 5 + rank, "one expert": 4, "a rank without tokens": 6 * (rank == 0)}[kind]
    tokens = torch.randn(number, WIDTH, generator=generator)
    chosen = torch.randint(EXPERTS + 1, (number, 2), generator=generator)  # EXPERTS: dropped
    if kind == "one expert":
        chosen = torch.full_like(chosen, 2)
    return tokens, chosen, torch.rand(number, 2, generator=generator)


def scales(experts: Tensor) -> Tensor:
    return torch.arange(1.0, EXPERTS + 1)[experts]


def travelled(kind: str, wants_gradient: bool) -> list[Any]:
    group = dist.group.WORLD
    assert group is not None
    own = EXPERTS // group.size()
    parameter = torch.ones(own, WIDTH, requires_grad=True)
    tokens, chosen, weights = data(group.rank(), kind)
    tokens.requires_grad_(wants_gradient)
    weights.requires_grad_()

    def compute(arrived: Tensor, experts: Tensor, ones: Tensor) -> Tensor:
        assert bool((ones == 1).all())
        first = own * group.rank()
        return arrived * parameter[experts[:, 0]] * scales(experts + first)

    result = dispatched(compute, tokens, chosen, weights, num_experts=EXPERTS, group=group)
    result.square().sum().backward()
    gradient = torch.zeros(own, WIDTH) if parameter.grad is None else parameter.grad
    return [result.detach(), tokens.grad, weights.grad, gradient]


def expected(size: int, kind: str) -> list[list[Any]]:
    parameter = torch.ones(EXPERTS, WIDTH, requires_grad=True)
    found = []
    for rank in range(size):
        tokens, chosen, weights = data(rank, kind)
        tokens.requires_grad_()
        weights.requires_grad_()
        kept = (chosen < EXPERTS).float() * weights
        at = chosen.clamp_max(EXPERTS - 1)
        result = (tokens[:, None] * parameter[at] * scales(at)[..., None] * kept[..., None]).sum(1)
        result.square().sum().backward()
        found.append([result.detach(), tokens.grad, weights.grad])
    for each, part in zip(found, parameter.grad.chunk(size)):
        each.append(part)
    return found


def test_what_comes_back_and_its_gradients_are_those_of_one_process(ranks: RankPools) -> None:
    for size in (2, 4):
        for kind in ("plain", "one expert", "a rank without tokens"):
            for one, other in zip(expected(size, kind), ranks(size, travelled, kind, True), strict=True):
                torch.testing.assert_close(other, one)


def test_experts_learn_from_tokens_that_need_no_gradient(ranks: RankPools) -> None:
    for one, other in zip(expected(2, "one expert"), ranks(2, travelled, "one expert", False), strict=True):
        assert other[1] is None
        torch.testing.assert_close(other[2:], one[2:])
