"""The MFU of a step is model FLOPs over what the devices could have done, and its absence never stops a run."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainfleet.monitor import MonitorConfig
from trainfleet.tracks import Tracks, track
from trainfleet.training.recipe import Recipe
from trainfleet.training.utilisation import open_utilisation

PEAK = 1e9
BATCHES = [(torch.zeros(4, 8), torch.zeros(4, 2)) for _ in range(3)]


def mesh(ranks: int = 2, **also: Any) -> Any:
    """`ranks` of them, of which half see different data."""
    fake = {"device": "cpu", "world_size": ranks, "data_axes": SimpleNamespace(size=ranks // 2), "is_main": True}
    return SimpleNamespace(**{**fake, **also})


def squared(output: Tensor, batch: Any) -> Tensor:
    return (output - batch[1]).square().mean()


def monitor(**settings: Any) -> Recipe:
    return Recipe(monitor=MonitorConfig(peak_flops=PEAK, **settings))


def test_it_is_model_flops_over_seconds_ranks_and_peak() -> None:
    found = open_utilisation(monitor(log_interval=2), mesh(4), nn.Linear(8, 2), squared)
    assert found is not None
    assert found.of(1, BATCHES, 1, 0.5) is None  # not yet
    flops = 3 * 2 * (2 * 4 * 8 * 2)  # micro-batches, ranks that see different data, of forward; no gradient of an input
    assert found.of(2, BATCHES, 1, 0.5) == pytest.approx((flops + flops) / (0.5 * 4 * PEAK))


def test_a_users_figure_counts_for_each_token() -> None:
    recipe = monitor(flops_per_token=600.0, log_interval=1)
    found = open_utilisation(recipe, mesh(2), nn.Linear(8, 2), squared)
    assert found is not None and found.of(1, BATCHES, 1000, 0.25) == pytest.approx(600_000 / (0.25 * 2 * PEAK))


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if x.sum().item() > 0 else x


def test_what_cannot_be_counted_is_told_once_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    found = open_utilisation(monitor(log_interval=1), mesh(), Looks(), lambda output, batch: output.sum())
    assert found is not None
    with caplog.at_level(logging.INFO, logger="trainfleet"):
        assert [found.of(step, [torch.zeros(2, 3)], 1, 0.5) for step in (1, 2, 3)] == [None] * 3
    assert [each.levelname for each in caplog.records].count("INFO") == 2  # the peak, and why it is not shown
    assert "monitor.flops_per_token" in caplog.text
    assert open_utilisation(monitor(), mesh(), nn.LazyLinear(2), squared) is None


def test_nobody_counts_who_does_not_speak_for_all_or_was_told_not_to() -> None:
    assert open_utilisation(monitor(), mesh(is_main=False), nn.Linear(8, 2), squared) is None
    recipe = monitor()
    recipe = replace(recipe, monitor=replace(recipe.monitor, mfu=False))
    assert open_utilisation(recipe, mesh(), nn.Linear(8, 2), squared) is None


def test_counting_draws_and_tracks_nothing() -> None:
    def telling(output: Tensor, batch: Any) -> Tensor:
        track("seen", random.random() + np.random.rand(), reduce="sum")
        return squared(output, batch)

    model = nn.Sequential(nn.Linear(8, 2), nn.Dropout(0.5))
    found = open_utilisation(monitor(log_interval=1), mesh(), model, telling)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    with Tracks() as tracks:
        assert found is not None and found.of(1, BATCHES, 1, 0.5)
    assert tracks.take() == []
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
