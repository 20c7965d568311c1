"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What `fit` returns."""

    step: int
    reason: str
    """`finished`, `stopped early`, `interrupted`, or `finished before` this call."""
    loss: float | None
    """Of the last step of this call."""
    evaluation: float | None
    """The last evaluation's loss."""
