"""What a run was limited by: its computing, or what its batches waited for; and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping

from trainfleet.events import StepEnded
from trainfleet.monitor.units import percentages

COMPUTING = "computing"
_FEW = 5
"""Percent of waiting that are not worth anybody's time."""
_REMEDIES = {
    "source": "Reading the samples is the limit: raise data.workers{or_feeders}, or put the data on faster storage.",
    "transform": "Transform and collate are the limit: raise data.workers{or_feeders}, or do less there.",
    "network": "The network is the limit: keep samples uint8 and cast them on the device (data.on_device), or bring "
    "the feeders nearer.",
    "data": "The batches are the limit: raise data.workers{or_feeders}.",
}


def shares_of(seconds: float, data_seconds: float, waits: Mapping[str, float]) -> dict[str, float]:
    """Of the time of steps: the share of computing, and of each cause of waiting; 1 together, or nothing at all.

    Where nobody knows what was waited for (no `waits`), all that getting batches took is `data`. Otherwise what it took
    beside waiting, such as to copy them into pinned memory, is the loop's own work.
    """
    if seconds <= 0.0:
        return {}
    causes = {cause: share for cause, share in waits.items() if share > 0.0} if waits else {"data": data_seconds}
    whole = max(seconds, sum(causes.values()))
    shares = {cause: share / whole for cause, share in causes.items()}
    return {COMPUTING: max(0.0, 1.0 - sum(shares.values())), **shares}


class Limit:
    """Of a whole run; its first step, which warms everything up, counts only while it is alone."""

    def __init__(self) -> None:
        self._steps = 0
        self._is_fed = False
        self._begin()

    def _begin(self) -> None:
        self._seconds = self._data_seconds = 0.0
        self._waits: dict[str, float] = {}

    def update(self, event: StepEnded) -> None:
        if self._steps == 1:
            self._begin()
        self._steps += 1
        self._seconds += event.seconds
        self._data_seconds += event.data_seconds
        self._is_fed |= event.received_bytes > 0
        for cause, seconds in event.waits.items():
            self._waits[cause] = self._waits.get(cause, 0.0) + seconds

    @property
    def percentages(self) -> dict[str, int]:
        """Of the time of all steps, by what it went into; 100 together, nothing before the first step."""
        return percentages(shares_of(self._seconds, self._data_seconds, self._waits))

    @property
    def sentence(self) -> str:
        """What was the limit, and what to do; empty before the first step."""
        parts = self.percentages
        if not parts:
            return ""
        waiting = {cause: share for cause, share in parts.items() if cause != COMPUTING}
        if sum(waiting.values()) < _FEW:
            return "Computing is the limit: the batches were there in time, and more workers or feeders gain nothing."
        return remedy(max(waiting, key=lambda cause: waiting[cause]), is_fed=self._is_fed)


def remedy(cause: str, *, is_fed: bool) -> str:
    """What to do where batches are waited for because of `cause`."""
    return _REMEDIES[cause].format(or_feeders=", start more feeders" if is_fed else "")


def in_words(parts: Mapping[str, int]) -> str:
    """`62% computing, 30% source, 8% network`, the largest first."""
    return ", ".join(f"{share}% {name}" for name, share in sorted(parts.items(), key=lambda part: -part[1]) if share)
