"""Jumps: whether a value leaves its own history upwards, by statistics that neither a trend nor an outlier moves.

    e = x - median of the 20 values before        the excess over what is usual now
    a jump:  e > deviations x 1.4826 x MAD(e),  e > 2 x the largest e remembered,  and it is worth telling

over the last 100 values. Excesses are taken from a median that moves along, so a falling loss or a warm-up is no
outlier; 1.4826 x MAD is the standard deviation of normal noise, which outliers do not move (Hampel 1974; Leys et al.
2013, doi:10.1016/j.jesp.2013.03.013). Seven of them are a spike in OLMo 2 (arXiv:2501.00656). The largest excess
remembered keeps heavy tails quiet: losses of tiny batches are no normal noise.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from trainfleet.monitor.anomalies.robust import deviation

NEAR = 20
"""Values whose median is the usual."""
REMEMBERED = 100
"""Excesses that tell how noisy it is."""
ENOUGH = 50
"""Values before any is judged: the first steps of a run are unlike the others."""


class Jump(NamedTuple):
    """By how much."""

    usual: float
    deviations: float
    """Robust standard deviations above the usual; infinite where there was no noise at all."""


class Jumps:
    """Remembers values that were accepted, and says of a further one whether it jumps."""

    def __init__(self, *, deviations: float, is_worth: Callable[[float, float, float], bool]) -> None:
        """`is_worth(value, usual, first)` says whether a value is high enough to be told at all, whatever the noise;
        `first` is the usual of the first values. It is asked first, for it is cheap."""
        self._deviations, self._is_worth = deviations, is_worth
        self.forget()

    def forget(self) -> None:
        """Begin anew, with nothing remembered."""
        self._near: deque[float] = deque(maxlen=NEAR)
        self._sorted: list[float] = []
        self._excesses: deque[float] = deque(maxlen=REMEMBERED)
        self._first: float | None = None
        self._count = 0

    @property
    def knows_enough(self) -> bool:
        """Whether it judges."""
        return self._count >= ENOUGH

    def judge(self, value: float) -> Jump | None:
        """The jump that `value` is, or None."""
        if not self.knows_enough or self._first is None:
            return None
        usual = self._usual()
        if not self._is_worth(value, usual, self._first):
            return None
        excess, scale = value - usual, deviation(self._excesses)
        if excess <= self._deviations * scale or excess <= 2 * max(self._excesses):
            return None
        return Jump(usual, excess / scale if scale > 0 else float("inf"))

    def accept(self, value: float) -> None:
        """Remember a value as one of the usual."""
        if len(self._near) == NEAR:
            usual = self._usual()
            self._first = usual if self._first is None else self._first
            self._excesses.append(value - usual)
            del self._sorted[bisect_left(self._sorted, self._near[0])]
        self._near.append(value)
        insort(self._sorted, value)
        self._count += 1

    def _usual(self) -> float:
        middle = len(self._sorted) // 2
        return (self._sorted[middle] + self._sorted[~middle]) / 2
