"""The moving average follows its formula, in pieces as in whole, and can take the place of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import whole
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.errors import ConfigError
from trainfleet.mesh import Mesh
from trainfleet.parallel import Ema, NativeEngine, parallelize
from trainfleet.plan import Plan


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.linear(x) + self.frozen


def square(output: Tensor, batch: Tensor) -> Tensor:
    return output.square().mean()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def follows(zero: int) -> dict[str, Any]:
    plan = Plan(zero=zero)
    with Mesh.from_env(plan) as mesh:
        torch.manual_seed(0)
        model = parallelize(Model(), mesh, plan)
        engine = NativeEngine(model, torch.optim.SGD(model.parameters(), lr=0.01), square)
        ema = Ema(model, 0.75)
        expected = {name: value for name, value in weights(model).items() if name != "frozen"}
        x = torch.ones(2, 5)
        for step in range(5):
            engine.forward_backward([x + step + mesh.rank])
            engine.step()
            ema.update()
            now = weights(model)
            expected = {name: 0.75 * old + 0.25 * now[name] for name, old in expected.items()}
        with torch.no_grad():
            before = model(x)  # leaves parameters gathered under ZeRO
        own = weights(model) if zero == 0 else now
        with ema.applied():
            averages = {name: value for name, value in weights(model).items() if name != "frozen"}
            with torch.no_grad():
                inside = model(x)
            grad_mode = torch.is_grad_enabled()
        with torch.no_grad():
            after = model(x)
        with pytest.raises(ZeroDivisionError), ema.applied():
            _ = 1 / 0
        engine.evaluate([x])  # at rest again
        by_formula = expected["gain"] * (x @ expected["linear.weight"].T + expected["linear.bias"]) + 1
    return {
        "averages": max(float((averages[name] - expected[name]).abs().max()) for name in expected),
        "inside": torch.allclose(inside, by_formula, atol=1e-5),
        "after": torch.equal(before, after),
        "own": all(torch.equal(own[name], value) for name, value in weights(model).items()),
        "grad mode": grad_mode,
        "replicas": [piece.replica for piece in ema.state_dict().values()],
    }


def test_it_follows_the_formula_and_gives_the_weights_back(ranks: RankPools) -> None:
    for zero in (0, 1, 3):
        for rank, found in enumerate(ranks(2, follows, zero)):
            assert found["averages"] < 1e-6
            assert found["inside"] and found["after"] and found["own"] and found["grad mode"]
            # The names in order: gain (whole), linear.weight and linear.bias (in pieces, with ZeRO).
            assert found["replicas"] == ([rank, 0, 0] if zero else [rank] * 3)


def test_a_decay_outside_of_0_and_1_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.ema_decay is 1.5"):
        Ema(nn.Linear(1, 1), 1.5)
