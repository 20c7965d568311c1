"""The first gradient that is not finite is that of the backward which made it."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn
from training.inspection.test_watch import Chain, Gives, X, watched

from trainfleet.training.inspection.watch import Watch


class Bad(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * math.nan


def claimed(watch: Watch) -> tuple[str, str]:
    assert watch.gradient is not None and not watch.losses
    return watch.gradient.claim.kind, watch.gradient.claim.module


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_the_backward_of_a_branch_is_told_from_the_trunk() -> None:
    model = Chain(nn.Linear(3, 3), Residual(Gives(Bad.apply)), Residual(nn.Linear(3, 3)))
    assert claimed(watched(model, X)) == ("input", "parts.1.branch")


def test_a_branch_is_not_blamed_for_its_trunk() -> None:
    class Trunk(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return Bad.apply(x) + self.branch(x)

    model = Chain(nn.Linear(3, 3), Trunk(nn.Linear(3, 3)))
    assert claimed(watched(model, X)) == ("input", "parts.1")


def test_modules_that_hand_on_what_they_get_are_not_blamed() -> None:
    model = Chain(nn.Linear(3, 3), nn.Identity(), Gives(lambda x: x), between=lambda x: x)
    assert claimed(watched(model, X, lambda out: Bad.apply(out).sum())) == ("loss", "")
    calls = iter([lambda x: x, Bad.apply, lambda x: x])
    model = Chain(nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 3), between=lambda x: next(calls)(x))
    assert claimed(watched(model, X)) == ("output", "parts.1")


def test_a_sample_is_told_by_the_input_where_a_parameter_came_first() -> None:
    class OneRow(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            return torch.tensor([[1.0], [math.nan]]) * gradient

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return OneRow.apply(super().forward(x))

    watch = watched(Chain(nn.Linear(3, 3), Own(3, 3)), X)
    assert claimed(watch) == ("input", "parts.1") and watch.gradient.lines.samples_of(2) == (1,)
    first = watched(Own(3, 3), X)  # nothing is learned through its input
    assert claimed(first) == ("parameter", "")
