"""Joined optimizers do what each does alone, and look like one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from trainfleet.errors import ConfigError
from trainfleet.parallel.joined_optimizer import JoinedOptimizer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def parts(model: nn.Sequential, lr: float = 0.1) -> tuple[Optimizer, Optimizer]:
    return torch.optim.Adagrad(model[0].parameters(), lr=lr), torch.optim.AdamW(model[1].parameters(), lr=lr)


def take_step(model: nn.Module, *optimizers: Optimizer) -> None:
    model.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_step_of_the_joined_is_a_step_of_each() -> None:
    apart, together = net(), net()
    alone, joined = parts(apart), JoinedOptimizer(*parts(together))
    for _ in range(3):
        take_step(apart, *alone)
        take_step(together, joined)
    assert_equal(apart, together)
    assert set(joined.state) == set(together.parameters())
    assert [len(group["params"]) for group in joined.param_groups] == [2, 2]


def test_state_is_loaded_into_the_parts_and_schedules_reach_them() -> None:
    model = net()
    optimizer = JoinedOptimizer(*parts(model))
    take_step(model, optimizer)
    other = copy.deepcopy(model)
    resumed = JoinedOptimizer(*parts(other, lr=9.0))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedules = [torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in (optimizer, resumed)]
    for _ in range(3):
        take_step(model, optimizer)
        take_step(other, resumed)
        for schedule in schedules:
            schedule.step()
    assert [part.param_groups[0]["lr"] for part in resumed.parts] == [0.1 / 8, 0.1 / 8]
    assert_equal(model, other)


def test_a_copy_steps_on_its_own() -> None:
    model = net()
    model_copy, optimizer = copy.deepcopy((model, JoinedOptimizer(*parts(model))))
    before = copy.deepcopy(model)
    take_step(model_copy, optimizer)
    assert_equal(model, before)
    assert not torch.equal(model_copy[0].weight, model[0].weight)
    assert not torch.equal(model_copy[1].weight, model[1].weight)


def test_a_closure_is_called_once_and_hooks_run() -> None:
    model = net()
    optimizer = JoinedOptimizer(*parts(model))
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("hook"))

    def closure() -> float:
        called.append("closure")
        return 1.5

    assert optimizer.step(closure) == 1.5
    assert called == ["hook", "closure"]


def test_parameters_cannot_be_added_later() -> None:
    model = net()
    optimizer = JoinedOptimizer(*parts(model))
    with pytest.raises(ConfigError, match="build them anew"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
