"""Ranks that come to the blocks of a sharded model in different orders are stopped with a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize
from trainfleet.plan import Plan

SAME = [0, 1, 2]
SHARDED = [Plan(zero=1, blocks=("towers.*",)), Plan(zero=3)]


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor, way: list[int]) -> Tensor:
        for number in way:
            x = self.towers[number](x)
        return x


def call(model: nn.Module, batch: Any) -> Tensor:
    return model(*batch)


def mean(output: Tensor, batch: Any) -> Tensor:
    return output.mean()


def ways(plan: Plan, steps: list[list[list[int]]]) -> list[str]:
    """What each step says, given the way of each rank."""
    said = []
    with Mesh.from_env(plan) as mesh:
        model = parallelize(Towers(), mesh, plan)
        engine = NativeEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), mean, forward=call)
        for by_rank in steps:
            try:
                engine.forward_backward([(torch.ones(1, 4), SAME), (torch.ones(1, 4), by_rank[mesh.rank])])
                engine.step()
                said.append("")
            except PlanError as error:
                said.append(f"{error} {error.hint}")
    return said


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([0, 2], "rank 0 has come to towers.1 and rank 1 to towers.2"),
        ([0, 1], "rank 0 has come to towers.2 and rank 1 to the end of forward"),
        ([0, 1, 2, 2], "rank 0 has come to the end of forward and rank 1 to towers.2"),
    ],
)
def test_the_first_step_says_where_ways_part_before_anybody_waits(
    ranks: RankPools, other: list[int], message: str
) -> None:
    for plan in SHARDED:
        first, second = ranks(2, ways, plan, [[SAME, other], [SAME, SAME]])
        assert first == second and message in first[0] and "plan.zero=0" in first[0]
        assert first[1] == "", "the next step is whole again"


def test_later_steps_compare_the_ways(ranks: RankPools) -> None:
    """As many gathers of equal shapes, but of other blocks: nobody waits, and all numbers are wrong."""
    for plan in SHARDED:
        first, second = ranks(2, ways, plan, [[SAME, SAME], [SAME, [0, 2, 1]]])
        assert first == second and first[0] == "" and "in this step they did not" in first[1]


def test_replicas_and_models_of_one_unit_may_go_their_own_ways(ranks: RankPools) -> None:
    for zero in (0, 1, 2):
        assert ranks(2, ways, Plan(zero=zero), [[SAME, [0]], [[2, 1], [0]]]) == [["", ""], ["", ""]]
    assert ranks(1, ways, Plan(zero=3), [[[0]], [[2, 1]]]) == [["", ""]]
