"""Which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainfleet.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """The last few, and one of each so many steps for ever."""

    last: int = 3
    """The newest ones, in the order in which they were committed."""
    every: int | None = None
    """And for ever those whose step is a multiple of this."""

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ConfigError(f"Retention.last is {self.last}; keep at least 1.")
        if self.every is not None and self.every < 1:
            raise ConfigError(f"Retention.every is {self.every}; use at least 1 step, or None for no others.")

    def removable(self, steps: Sequence[int]) -> list[int]:
        """Of `steps`, oldest commit first, those not kept; never the last one, which was just seen to be whole."""
        return [step for step in steps[: -self.last] if self.every is None or step % self.every]
