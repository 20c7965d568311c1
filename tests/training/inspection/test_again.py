"""A step that is run again finds buffers and generators as the first time, and leaves them as it found them."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn

from trainfleet.training.inspection.again import Again


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("fixed", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1  # another tensor each time
        return self.norm(x) * random.random() + self.seen


def state(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def test_the_second_run_is_the_first(again_after: int = 3) -> None:
    model, x = Drawing(), torch.randn(4, 3)
    again = Again(model)
    for _ in range(again_after):
        again.remember()
        first = model(x)
    after, drawn = state(model), random.getstate()
    with again.as_before() as is_compiled:
        second = model(x)
    assert torch.equal(first, second) and not is_compiled
    assert all(torch.equal(*pair) for pair in zip(after, state(model), strict=True)) and random.getstate() == drawn
    assert set(again._copies) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "seen"}


def test_a_buffer_that_changes_for_the_first_time_is_named() -> None:
    model = Drawing()
    again = Again(model)
    for _ in range(2):
        again.remember()
        model(torch.ones(2, 3))
    assert again.late() == []
    again.remember()
    model.fixed += 1
    assert again.late() == ["fixed"]
