"""LossSum: a loss before the division, so that unequal micro-batches and ranks weigh what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LossSum:
    """A sum of losses and the weight it stands for: tokens, samples, or 1 for a plain mean.

    The gradient of a step is that of sum(total) / sum(weight) over all micro-batches of all ranks,
    whatever their lengths. Averaging the means of unequal micro-batches is another, wrong, number.
    """

    total: Any
    """Scalar tensor inside the step (with its graph), float outside."""
    weight: Any
    """What `total` is summed over, a number or a scalar tensor without a graph."""

    @classmethod
    def of(cls, value: Any) -> LossSum:
        """A LossSum as it is; a plain scalar as one of weight 1: right where all micro-batches are equal."""
        return value if isinstance(value, LossSum) else cls(value, 1.0)

    @property
    def mean(self) -> float:
        """total / weight as a float; 0 where nothing was weighed."""
        weight = float(self.weight)
        total = self.total.detach() if hasattr(self.total, "detach") else self.total
        return float(total) / weight if weight else 0.0

    @property
    def mean_tensor(self) -> Any:
        """total / weight with its graph, for a loop that calls `backward` itself."""
        return self.total / self.weight

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.total + other.total, self.weight + other.weight)
