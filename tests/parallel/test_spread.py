"""A loop written by hand accumulates, steps and recovers as one process does."""

from __future__ import annotations

import pytest
import torch
from oracle import whole
from rank_pool import RankPools
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import accumulating, parallelize
from trainfleet.parallel.spread import is_spread, spread_of, whole_parameters
from trainfleet.plan import Plan

RANKS, ACCUMULATION, STEPS = 4, 3, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)))
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError("a bad batch")
        return self.gain * self.blocks(x)


def rows(step: int, number: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * step + number))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean() / ACCUMULATION


def by_hand(plan: Plan, bad_batches: bool) -> list[Tensor]:
    with Mesh.from_env(plan) as mesh:
        model = parallelize(Model(), mesh, plan)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(STEPS):
            mine = [rows(step, i * mesh.world_size + mesh.rank) for i in range(ACCUMULATION)]
            if bad_batches:
                with pytest.raises(ValueError, match="a bad batch"), accumulating(model):
                    loss_of(model, mine[0]).backward()
                    loss_of(model, torch.full((1, 5), float("nan")))
                optimizer.zero_grad()
            with accumulating(model):
                for x in mine[:-1]:
                    loss_of(model, x).backward()
            loss_of(model, mine[-1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            model(mine[0])  # a look at the model, without a backward
        spread_of(model).rest()
        return [whole(parameter) for parameter in model.parameters()]


def one_process() -> list[Tensor]:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        for number in range(RANKS * ACCUMULATION):
            (loss_of(model, rows(step, number)) / RANKS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


PLANS = [Plan(zero=zero) for zero in (0, 1, 2, 3)]
PLANS += [Plan(zero=zero, dp_replicate=2, dp_shard=2) for zero in (1, 2, 3)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_hand_written_loop_equals_one_process(ranks: RankPools, plan: Plan) -> None:
    expected = one_process()
    for bad_batches in (False, True):
        for found in ranks(RANKS, by_hand, plan, bad_batches):
            for a, b in zip(found, expected):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def forwards_alone() -> list[bool]:
    found = []
    for zero in (1, 2, 3):
        with Mesh.from_env(Plan(zero=zero)) as mesh:
            model = parallelize(Model(), mesh, Plan(zero=zero))
            with torch.no_grad():
                model(torch.ones(1, 5))
            spread_of(model).rest()
            cut = [p for p in model.parameters() if isinstance(p, DTensor)]
            found += [len(cut) == 6, [p.ndim for p in whole_parameters(model)] == [0]]
    return found


def test_after_a_rest_the_model_holds_its_pieces(ranks: RankPools) -> None:
    assert ranks(2, forwards_alone) == [[True] * 6] * 2


def test_a_model_that_was_not_spread_is_named() -> None:
    model = Model()
    assert not is_spread(model)
    with pytest.raises(PlanError, match=r"Model was not spread over a mesh. Call `model = parallelize"):
        spread_of(model)
