"""How fast a run goes and when it will be done, from its last steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from trainfleet.events import StepEnded
from trainfleet.monitor.limit import shares_of
from trainfleet.monitor.units import percentages


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    samples: int
    tokens: int
    seconds: float
    data_seconds: float
    waits: Mapping[str, float]
    received_bytes: int
    mfu: float | None


class Throughput:
    """Means over a window of steps; the first step, which warms everything up, counts only while it is alone."""

    def __init__(self, *, window: int = 50) -> None:
        self._window: deque[_Step] = deque(maxlen=window)
        self._seen = 0
        self._step_seconds = 0.0
        self._started: float | None = None
        self._now = 0.0

    def update(self, event: StepEnded, *, now: float) -> None:
        """`now` is a monotonic clock in seconds; it sees what happens between steps, such as evaluations."""
        if self._seen == 1:
            self._window.clear()
        self._window.append(
            _Step(
                samples=event.samples,
                tokens=event.tokens,
                seconds=event.seconds,
                data_seconds=event.data_seconds,
                waits=event.waits,
                received_bytes=event.received_bytes,
                mfu=event.mfu,
            )
        )
        if self._started is None:
            self._started = now - event.seconds
        self._seen += 1
        self._step_seconds += event.seconds
        self._now = now

    @property
    def tokens_per_second(self) -> float:
        return self._per_second(sum(step.tokens for step in self._window))

    @property
    def samples_per_second(self) -> float:
        return self._per_second(sum(step.samples for step in self._window))

    @property
    def steps_per_second(self) -> float:
        return self._per_second(len(self._window))

    @property
    def mfu(self) -> float | None:
        """Of the steps that have one, each for as long as it took; None before the first."""
        known = [(step.mfu, step.seconds) for step in self._window if step.mfu is not None]
        seconds = sum(each for _, each in known)
        return sum(mfu * each for mfu, each in known) / seconds if seconds else None

    @property
    def received_bytes_per_second(self) -> float:
        """Of batches from feeders."""
        return self._per_second(sum(step.received_bytes for step in self._window))

    @property
    def percentages(self) -> dict[str, int]:
        """Of a step's time: computing, and what batches were waited for; 100 together."""
        waits: dict[str, float] = {}
        for step in self._window:
            for cause, seconds in step.waits.items():
                waits[cause] = waits.get(cause, 0.0) + seconds
        totals = (sum(step.seconds for step in self._window), sum(step.data_seconds for step in self._window))
        return percentages(shares_of(*totals, waits))

    def remaining_seconds(self, steps: int) -> float:
        """Until so many more steps are taken, with evaluations and saves as often as so far; NaN before the first."""
        if not self._window or self._started is None:
            return math.nan
        step_seconds = sum(step.seconds for step in self._window) / len(self._window)
        between = max(0.0, self._now - self._started - self._step_seconds) / self._seen
        return steps * (step_seconds + between)

    def _per_second(self, amount: float) -> float:
        seconds = sum(step.seconds for step in self._window)
        return amount / seconds if seconds > 0 else 0.0


class Smoothed:
    """An exponential mean of finite values, right from the first one; `half_life` counts values."""

    def __init__(self, *, half_life: float = 20.0) -> None:
        self._keep = 0.5 ** (1 / half_life)
        self._sum = 0.0
        self._weight = 0.0

    def update(self, value: float) -> float:
        if math.isfinite(value):
            self._sum = self._keep * self._sum + (1 - self._keep) * value
            self._weight = self._keep * self._weight + (1 - self._keep)
        return self.value

    @property
    def value(self) -> float:
        """NaN before the first finite value."""
        return self._sum / self._weight if self._weight else math.nan
