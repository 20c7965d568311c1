"""Random numbers of the model depend on the seed, the step and the micro-batch, and on nothing else."""

from __future__ import annotations

import functools
from typing import cast

import pytest
import torch
from models import MODELS
from rank_pool import RankPools
from torch import nn

from trainfleet.comm.group import Group
from trainfleet.mesh import Mesh
from trainfleet.parallel.randomness import mixed, number_in_step, seed_micro_batch
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case, together
from trainfleet.training.proof.trace import trace
from trainfleet.training.proof.verdict import Trace, compare

DROPOUT = MODELS["transformer"]


def drawn(seed: int, step: int, micro_batch: int) -> float:
    seed_micro_batch(seed, step, micro_batch)
    return torch.rand(()).item()


def test_the_same_place_draws_the_same_and_others_do_not() -> None:
    places = [(seed, step, micro_batch) for seed in range(8) for step in range(16) for micro_batch in range(16)]
    first = {place: drawn(*place) for place in places}
    assert first == {place: drawn(*place) for place in reversed(places)}
    assert len(set(first.values())) > 0.999 * len(places), "a float32 has 24 bits"
    assert abs(sum(first.values()) / len(first) - 0.5) < 0.03


def test_any_integer_is_a_seed() -> None:
    for seed in (0, -1, 1 << 70, (1 << 64) - 1):
        assert 0 <= drawn(seed, 0, 0) < 1 and 0 <= mixed(seed) < 1 << 64


class Seat:
    """The rank of one process in a group, without the group."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_each_part_of_each_ranks_batches_has_the_number_it_has_in_one_process(size: int, parts: int) -> None:
    dealt = [(batch, part) for batch in range(2 * size) for part in range(parts)]
    for rank in range(size):
        own = [place for place in dealt if place[0] % size == rank]
        seat = cast(Group, Seat(rank, size))
        assert [dealt[number_in_step(i, parts, seat)] for i in range(len(own))] == own


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def case(accumulation: int) -> Case:
    return Case(
        build=functools.partial(DROPOUT.build, 0, dropout=0.4),
        loss_fn=DROPOUT.loss_fn,
        micro_batch=functools.partial(DROPOUT.micro_batch, 0),
        optimizer=adamw,
        accumulation=accumulation,
    )


def traced(accumulation: int, plan: Plan, ranks: int) -> Trace:
    with Mesh.from_env(plan) as mesh:
        return trace(together(case(accumulation), ranks), plan, mesh)


@pytest.mark.parametrize("plan", [Plan(), Plan(zero=3, recompute="blocks")], ids=str)
def test_dropout_is_that_of_one_process(ranks: RankPools, plan: Plan) -> None:
    alone = ranks(1, traced, 2, Plan(), 2)[0]
    verdict = compare(alone, ranks(2, traced, 2, plan, 1)[0], "fp32")
    assert verdict.holds, verdict
    other_order = compare(alone, ranks(1, traced, 1, Plan(), 1)[0], "fp32")
    assert not other_order.holds, "the comparison would see a difference"
