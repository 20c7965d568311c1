"""The steps of a run for pictures and tables: one by one while they are few, in groups when they are many."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainfleet.monitor.history.goodput import finite, phases_of

MAX_GROUPS = 4000
"""More points than a picture has columns cost time and show nothing."""


@dataclass(kw_only=True, slots=True)
class Group:
    """Consecutive steps that stand; of one step alone, its very numbers."""

    step: int
    """The last of them, as what has no mean: time, learning rate."""
    time: float
    num_steps: int = 0
    loss: float = math.nan
    """Mean of the finite ones; NaN where there is none."""
    least_loss: float = math.inf
    most_loss: float = -math.inf
    not_finite: int = 0
    """Losses that were NaN or infinite."""
    learning_rate: float = math.nan
    grad_norm: float = math.nan
    """The largest."""
    samples: float = 0
    tokens: float = 0
    seconds: float = 0.0
    """In steps."""
    between_seconds: float = 0.0
    """Between them: evaluation, saves."""
    data_seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by phase, of steps and what is between them. From files without phases: computing and data."""
    memory_bytes: int = 0
    """The most, of the rank that speaks for all."""
    mfu: float = math.nan
    """The last that is known."""

    @property
    def tokens_per_second(self) -> float:
        """Of time in steps; NaN where that is nothing."""
        return self.tokens / self.seconds if self.seconds > 0 else math.nan

    def add(self, row: Mapping[str, Any]) -> None:
        self.step, self.time = row["step"], finite(row.get("time"))
        self._add_loss(row.get("loss"))
        self.num_steps += 1
        self.learning_rate = _number(row.get("learning_rate"))
        norm = _number(row.get("grad_norm"))
        if not norm <= self.grad_norm:
            self.grad_norm = norm
        self.samples += finite(row.get("samples"))
        self.tokens += finite(row.get("tokens"))
        self.seconds += finite(row.get("seconds"))
        self.between_seconds += finite(row.get("between_seconds"))
        self.data_seconds += finite(row.get("data_seconds"))
        sums, phases = self.phases, phases_of(row)
        if not sums:
            sums.update(phases)
        else:
            for phase, seconds in phases.items():
                sums[phase] = sums.get(phase, 0.0) + seconds
        self.memory_bytes = max(self.memory_bytes, int(finite(row.get("memory_bytes"))))
        mfu = row.get("mfu")
        if mfu is not None:
            self.mfu = _number(mfu)

    def _add_loss(self, value: Any) -> None:
        loss = _number(value)
        if not math.isfinite(loss):
            self.not_finite += 1
            return
        known = self.num_steps - self.not_finite
        self.loss = loss if known == 0 else self.loss + (loss - self.loss) / (known + 1)
        self.least_loss, self.most_loss = min(self.least_loss, loss), max(self.most_loss, loss)


class Steps:
    """Collects the lines of steps that stand, in order, in groups of `every`."""

    def __init__(self, num_steps: int, *, most: int = MAX_GROUPS) -> None:
        self.every = max(1, math.ceil(num_steps / most))
        self.groups: list[Group] = []
        self._first = Group(step=0, time=0.0)  # the first of each start, which warm everything up
        self._is_first = True

    def begin(self) -> None:
        """The next step is the first of a start."""
        self._is_first = True

    def add(self, row: Mapping[str, Any]) -> None:
        if not self.groups or self.groups[-1].num_steps >= self.every:
            self.groups.append(Group(step=0, time=0.0))
        self.groups[-1].add(row)
        if self._is_first:
            self._first.add(row)
            self._is_first = False

    @property
    def num_steps(self) -> int:
        return sum(group.num_steps for group in self.groups)

    @property
    def phases(self) -> dict[str, float]:
        """Seconds by phase of all steps."""
        sums: dict[str, float] = {}
        for group in self.groups:
            for phase, seconds in group.phases.items():
                sums[phase] = sums.get(phase, 0.0) + seconds
        return sums

    @property
    def not_finite(self) -> int:
        """Losses that were NaN or infinite."""
        return sum(group.not_finite for group in self.groups)

    @property
    def peak_bytes(self) -> int:
        """Of the rank that speaks for all."""
        return max((group.memory_bytes for group in self.groups), default=0)

    @property
    def tokens_per_second(self) -> float:
        return self._per_second("tokens")

    @property
    def samples_per_second(self) -> float:
        return self._per_second("samples")

    @property
    def step_seconds(self) -> float:
        """The mean of a step."""
        return 1 / self._per_second("num_steps") if self.groups else math.nan

    @property
    def mfu(self) -> float:
        """The mean of what is known of it, of 1; NaN where nothing is."""
        known = [group.mfu for group in self.groups if not math.isnan(group.mfu)]
        return sum(known) / len(known) if known else math.nan

    def _per_second(self, name: str) -> float:
        """Of time in steps. The first step of each start counts only while there are no others."""
        amount = sum(getattr(group, name) for group in self.groups)
        seconds = sum(group.seconds for group in self.groups)
        if self.num_steps > self._first.num_steps:
            amount -= getattr(self._first, name)
            seconds -= self._first.seconds
        return amount / seconds if seconds > 0 else math.nan


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
