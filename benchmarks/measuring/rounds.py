"""Paired figures: contenders take turns, and only what stood in the same round is compared."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence


def ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Round by round."""
    return [mine / theirs for mine, theirs in zip(times, reference, strict=True)]


def interval(values: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """Where the median of such values lies in 95 of 100 cases (bootstrap; the same for the same values)."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(resamples))
    return medians[int(resamples * 0.025)], medians[int(resamples * 0.975)]


def shown(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}"
