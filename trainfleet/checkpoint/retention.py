"""Which checkpoints are kept."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trainfleet.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """The last few, one of each so many steps for ever, and the best few by a metric."""

    last: int = 3
    """The newest ones, in the order in which they were committed."""
    every: int | None = None
    """And for ever those whose step is a multiple of this."""
    best: int | None = None
    """And so many of those with the best `metric`; the newer one where two are equal."""
    metric: str = "loss"
    """One of the metrics given to `save`."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger metric is better."""

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ConfigError(f"Retention.last is {self.last}; keep at least 1.")
        if self.every is not None and self.every < 1:
            raise ConfigError(f"Retention.every is {self.every}; use at least 1 step, or None for no others.")
        if self.best is not None and self.best < 1:
            raise ConfigError(f"Retention.best is {self.best}; keep at least 1, or None for no others.")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"Retention.mode is {self.mode!r}; use 'min' or 'max'.")

    def removable(
        self, committed: Sequence[tuple[int, Mapping[str, float]]], damaged: Collection[int] = ()
    ) -> list[int]:
        """Of the steps and metrics of `committed`, oldest commit first, the steps that are not kept.

        `damaged` ones count for nothing: they go when enough sound ones are newer. Never the last one, which was just
        seen to be whole.
        """
        best = self._best([(step, metrics) for step, metrics in committed if step not in damaged])
        found = []
        num_newer = 0
        for step, _ in reversed(committed):
            if num_newer >= self.last and (self.every is None or step % self.every) and step not in best:
                found.append(step)
            num_newer += step not in damaged
        return found[::-1]

    def _best(self, committed: Sequence[tuple[int, Mapping[str, float]]]) -> set[int]:
        if self.best is None:
            return set()
        measured = [
            (value if self.mode == "min" else -value, -age, step)
            for age, (step, metrics) in enumerate(committed)
            if not math.isnan(value := float(metrics.get(self.metric, math.nan)))
        ]
        return {step for _, _, step in sorted(measured)[: self.best]}
