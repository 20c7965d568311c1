from __future__ import annotations

import math
from typing import Any

import pytest

from trainfleet.monitor.throughput import Smoothed, Throughput


def test_the_first_step_counts_only_while_it_is_alone(story: Any) -> None:
    speed = Throughput()
    speed.update(story.step(1, seconds=10.0), now=10.0)
    assert speed.tokens_per_second == pytest.approx(102.4)
    speed.update(story.step(2, seconds=0.1), now=10.1)
    assert speed.tokens_per_second == pytest.approx(10240)
    assert speed.samples_per_second == pytest.approx(80)


def test_what_remains_includes_the_time_between_steps(story: Any) -> None:
    speed = Throughput()
    for step in range(1, 11):  # each step takes 1 s, and 1 s of evaluation follows every one
        speed.update(story.step(step, seconds=1.0), now=2.0 * step - 1)
    assert speed.remaining_seconds(10) == pytest.approx(10 * (1.0 + 9 / 10))


def test_nothing_is_promised_before_the_first_step() -> None:
    assert math.isnan(Throughput().remaining_seconds(10))
    assert math.isnan(Smoothed().value)


def test_waiting_for_data_is_a_share_of_the_step(story: Any) -> None:
    speed = Throughput()
    speed.update(story.step(1, seconds=0.2, data_seconds=0.05), now=1.0)
    assert speed.percentages == {"computing": 75, "data": 25}


def test_the_smoothed_loss_starts_at_the_first_value_and_forgets_by_half() -> None:
    smoothed = Smoothed(half_life=1)
    assert smoothed.update(4.0) == 4.0
    assert smoothed.update(1.0) == pytest.approx((0.25 * 4 + 0.5 * 1) / 0.75)


def test_an_overflow_does_not_spoil_the_smoothed_loss() -> None:
    smoothed = Smoothed()
    smoothed.update(2.0)
    assert smoothed.update(math.nan) == smoothed.update(math.inf) == 2.0
