"""Finding: what a detector has to say, once when it begins and once when it is over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """That an anomaly has begun, or is over."""

    kind: str
    """One of `events.ANOMALIES`."""
    what: str
    """A sentence without its full stop."""
    is_over: bool = False
    lasts: bool = True
    """Whether it is in force until a finding says that it is over; False for what has happened once."""
    rank: int | None = None
    """On which rank, where the detector knows."""
    module: str | None = None


class Spell:
    """Whether something that is looked at again and again has begun, lasts, or is over."""

    def __init__(self, *, calm: int = 1) -> None:
        """It is over after `calm` looks in a row that see nothing."""
        self._calm = calm
        self._quiet = 0
        self.since: int | None = None
        """The step at which it began; None while nothing is the matter."""

    def begins(self, step: int) -> bool:
        """It was seen: True where that is news."""
        self._quiet = 0
        if self.since is not None:
            return False
        self.since = step
        return True

    def ends(self) -> int | None:
        """It was not seen: the step at which it had begun where it is over with this, else None."""
        if self.since is None:
            return None
        self._quiet += 1
        if self._quiet < self._calm:
            return None
        since, self.since, self._quiet = self.since, None, 0
        return since
