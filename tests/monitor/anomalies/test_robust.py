"""A few wild values move neither the deviation nor the slope."""

from __future__ import annotations

import random
import statistics

import pytest

from trainfleet.monitor.anomalies.robust import deviation, slope


def test_the_deviation_is_that_of_normal_noise_also_among_wild_values() -> None:
    draw = random.Random(0)
    noise = [draw.gauss(5, 2) for _ in range(4000)]
    assert deviation(noise) == pytest.approx(statistics.stdev(noise), rel=0.05)
    assert deviation([*noise, *[1e9] * 200]) == pytest.approx(2, rel=0.15)


def test_the_slope_is_that_of_the_line_also_with_an_outlier() -> None:
    xs = list(range(20))
    ys = [3.0 * x + 1 for x in xs]
    assert slope(xs, ys) == 3
    assert slope(xs, [1e6, *ys[1:]]) == pytest.approx(3)
    assert slope([1], [2]) == slope([], []) == 0
