"""The loss scale halves at an overflow, doubles after its window, and ends a run with a sentence."""

from __future__ import annotations

import pytest

from trainfleet.errors import TrainfleetError
from trainfleet.parallel.loss_scale import LossScaler
from trainfleet.plan import LossScale


def scales(scaler: LossScaler, overflows: str) -> list[float]:
    """After each step; `x` is one that overflowed."""
    found = []
    for step in overflows:
        scaler.update(overflow=step == "x")
        found.append(scaler.scale)
    return found


def test_it_halves_and_doubles() -> None:
    scaler = LossScaler(LossScale(initial=8.0, window=3, minimum=1.0))
    assert scales(scaler, "..x....x..." + "...") == [8, 8, 4, 4, 4, 8, 8, 4, 4, 4, 8, 8, 8, 16]


def test_it_never_falls_below_the_minimum_and_then_says_what_to_do() -> None:
    scaler = LossScaler(LossScale(initial=5.0, minimum=2.0))
    assert scales(scaler, "xx") == [2.5, 2.0]
    with pytest.raises(TrainfleetError, match=r"smallest loss scale, 2\. Lower the learning rate"):
        scaler.update(overflow=True)
    assert scales(scaler, ".") == [2.0]


def test_a_fixed_scale_stays_whatever_happens() -> None:
    assert scales(LossScaler(LossScale(initial=8.0, window=1, fixed=True)), "xx..x.") == [8.0] * 6


def test_its_state_brings_it_back_in_the_middle_of_a_window() -> None:
    settings = LossScale(initial=8.0, window=3)
    first, second = LossScaler(settings), LossScaler(settings)
    scales(first, "x..")
    second.load_state_dict(first.state_dict())
    assert scales(first, "....") == scales(second, "....") == [8.0, 8.0, 8.0, 16.0]
