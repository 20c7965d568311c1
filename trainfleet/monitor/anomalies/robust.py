"""Statistics that a few wild values do not move."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

NORMAL = 1.4826
"""Standard deviation of normal noise / its median absolute deviation."""


def deviation(values: Collection[float]) -> float:
    """The standard deviation, from the median absolute deviation; half of the values may be wild."""
    middle = statistics.median(values)
    return NORMAL * statistics.median(abs(value - middle) for value in values)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of a line through the points: the median over all pairs of them (Theil 1950, Sen 1968); 0 of fewer than two."""
    slopes = [
        (ys[j] - ys[i]) / (xs[j] - xs[i]) for i in range(len(xs)) for j in range(i + 1, len(xs)) if xs[j] != xs[i]
    ]
    return statistics.median(slopes) if slopes else 0.0
