"""Growth is told from caches that fill, from sizes in turn and from noise."""

from __future__ import annotations

import pytest

from trainfleet.monitor.profiling.allocations import Block
from trainfleet.monitor.profiling.growth import growth_of, is_rising, slope
from trainfleet.monitor.profiling.holdings import Holding

ENDS = [10, 20, 30, 40, 50]


def made(at: int, size: int, freed: int | None = None, operator: str = "aten::mm") -> Holding:
    return Holding(
        Block("cpu", at, size, at, freed, ("phase: forward", operator)), "activations", (("", size),), "forward"
    )


@pytest.mark.parametrize(
    ("values", "rising"),
    [
        ([1, 2, 3, 4], True),
        ([1, 2, 3, 2.9, 4, 5, 6], True),
        ([1, 2, 3], False),
        ([1, 5, 5, 5, 5], False),
        ([1, 2, 1, 2, 1, 2], False),
        ([3, 3, 3, 3, 9], False),
        ([4, 3, 2, 1], False),
    ],
)
def test_rising_is_nearly_every_pair(values: list[float], rising: bool) -> None:
    assert is_rising(values) == rising


def test_the_slope_is_a_median_that_one_outlier_does_not_move() -> None:
    assert slope([0, 10, 20, 500, 40, 50, 60]) == 10


def test_what_is_kept_at_each_step_is_suspected_and_what_comes_and_goes_is_not() -> None:
    leak = [made(10 * i + 1, 5000, operator="aten::exp") for i in range(5)]
    steady = [made(10 * i + 2, 9000, 10 * i + 12) for i in range(5)]
    growth = growth_of([*leak, *steady], ENDS, "cpu")
    (suspect,) = growth.suspects
    assert (suspect.operator, suspect.blocks, suspect.bytes_per_step) == ("aten::exp", 5, 5000)
    assert growth.bytes_per_step == 5000
    assert growth_of([*leak, *steady], ENDS, "cuda:0").suspects == ()


def test_a_cache_that_fills_and_a_few_bytes_a_step_are_no_growth() -> None:
    fills = [made(1, 10**6), made(11, 10**6)]
    few = [made(10 * i + 1, 8) for i in range(5)]
    assert growth_of([*fills, *few], ENDS, "cpu").suspects == ()
