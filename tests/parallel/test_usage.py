"""What no rank used is left alone; what one rank used is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import whole
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize
from trainfleet.parallel.usage import Usage
from trainfleet.plan import Plan


class Layer(nn.Module):
    """A block of which each rank may use another part."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor, numbers: tuple[int, ...]) -> Tensor:
        for number in numbers:
            x = x + torch.tanh(self.experts[number](x))
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.gains = nn.ParameterList(torch.tensor(1.0) for _ in range(4))

    def forward(self, x: Tensor, numbers: tuple[int, ...]) -> Tensor:
        for layer in self.layers:
            x = layer(x, numbers)
        for number in numbers:
            x = self.gains[number] * x
        return x


def call(model: nn.Module, batch: Any) -> Tensor:
    return model(*batch)


def square(output: Tensor, batch: Any) -> Tensor:
    return output.square().mean()


USED = [((0,), (0,)), ((0, 1), (0,)), ((1, 0), (2, 0, 2)), ((0,), (2, 1))]
"""By step: which experts each rank uses. Number 3 is never used, 2 only by rank 1."""


def moved(zero: int) -> list[list[bool]]:
    """By step: which experts have changed."""
    plan = Plan(zero=zero)
    with Mesh.from_env(plan) as mesh:
        model = parallelize(Model(), mesh, plan)
        # Without momentum, only weight decay could move what got no gradient.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, betas=(0.0, 0.0))
        engine = NativeEngine(model, optimizer, square, forward=call)
        changes = []
        for by_rank in USED:
            before = [whole(p) for p in model.parameters()]
            engine.forward_backward([(torch.ones(2, 4), by_rank[mesh.rank])] * 2)
            engine.clip(1.0)
            engine.step()
            changes.append([not torch.equal(a, whole(b)) for a, b in zip(before, model.parameters())])
        numbers = [int(name.split(".")[3 if name.startswith("layers") else 1]) for name, _ in model.named_parameters()]
    return [[any(c for c, n in zip(change, numbers) if n == expert) for expert in range(4)] for change in changes]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_what_no_rank_used_is_left_alone(ranks: RankPools, zero: int) -> None:
    for found in ranks(2, moved, zero):
        assert found == [[any(n in rank for rank in step) for n in range(4)] for step in USED]


def test_a_change_of_what_is_trained_is_named() -> None:
    model = Model()
    usage = Usage(model, None)
    usage.start()
    model.gains[2].requires_grad_(False)
    with pytest.raises(PlanError, match=r"requires_grad of gains.2 has changed since the model was spread"):
        usage.start()
