"""Tests of programs: stages that run one after the other give what the model gives, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from followed import in_stages, run_in_turn
from models import MODELS
from torch import Tensor, nn

from trainfleet.batch import call_with_batch
from trainfleet.errors import PlanError
from trainfleet.parallel.pipeline.record import tensors_of

COUNTS = {"transformer": 4, "convolutional": 5, "recurrent": 4, "scalars": 5, "own_loss": 3}


@pytest.mark.parametrize("name", MODELS)
def test_stages_in_turn_give_what_the_model_gives(name: str) -> None:
    for count in range(1, COUNTS[name] + 1):
        model, batch = MODELS[name].build(0), MODELS[name].micro_batch(0, 3)
        twin = MODELS[name].build(0)
        program, _ = in_stages(model, MODELS[name].micro_batch(0, 3), count)
        got, expected = run_in_turn(program, model, batch), call_with_batch(twin, batch)
        assert type(got) is type(expected)
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(got), tensors_of(expected), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


class Skips(nn.Module):
    """The input, a mask that follows from it, and what the first layer gives are all wanted at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mask = (x > 0).float().cumsum(0)
        first = x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(x) * mask + self.shift
        x[:, 0] = first[:, 1]
        return {"out": x + first * self.scale.exp(), "mask": mask}


def test_what_skips_stages_is_handed_on_and_what_follows_from_the_input_is_not() -> None:
    model, x = Skips(), torch.randn(3, 4)
    program, stages = in_stages(model, x, 4)
    assert [len(values) for values in program.crossings] == [3, 3, 3]  # x and two that follow from `first`
    assert not any(program.graph.output["mask"].number in values for values in program.crossings)
    assert stages.parameters["scale"] == (0,)  # as early as it can be used
    got, expected = run_in_turn(program, model, x), model(x)
    assert list(got) == ["out", "mask"]
    assert all(torch.equal(got[key], expected[key]) for key in expected)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.a(x) * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.b(y)


def test_gradients_and_autocast_are_switched_as_the_model_does() -> None:
    model, x = Frozen(), torch.randn(2, 3)
    program, _ = in_stages(model, x, 2)
    got = run_in_turn(program, model, x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, model(x))
    got.float().sum().backward()
    assert model.a.weight.grad is None


class Growing(nn.Module):
    """Gives one tensor more each time: not what the pipeline was laid out for."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))])
        self.blocks[0].forward = lambda x: (x,) * (2 + model_calls.pop())  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Any:
        return self.blocks[1](self.blocks[0](x)[0])


model_calls: list[int] = [1, 0]


def test_a_module_that_gives_another_number_of_tensors_is_found_out() -> None:
    model = Growing()
    program, _ = in_stages(model, torch.randn(2, 2), 2)
    with pytest.raises(PlanError, match=r"blocks\.0 gave 3 tensors, and 2 when"):
        run_in_turn(program, model, torch.randn(2, 2))
