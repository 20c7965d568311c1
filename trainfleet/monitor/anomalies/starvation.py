"""Starvation: whether steps wait for their batches, and what the batches wait for."""

from __future__ import annotations

from collections import Counter, deque

from trainfleet.events import StepEnded
from trainfleet.monitor.anomalies.finding import Finding, Spell
from trainfleet.monitor.limit import remedy

WINDOW = 100
FEWEST = 20
"""Steps that a window needs to be judged."""
WARM_UP = 5
"""First steps, in which workers start."""
MUCH = 0.2
"""Share of its time that a step waits to count as one that waits."""


class Starvation:
    """Counts the steps of a window that wait, on this rank."""

    kind = "data_starvation"

    def __init__(self, *, share: float, lasting_seconds: float) -> None:
        self._share, self._lasting = share, lasting_seconds
        self._window: deque[StepEnded] = deque()
        self._num_waiting = 0
        self._seconds = 0.0
        self._num_steps = 0
        self._spell = Spell()

    def end(self, ended: StepEnded) -> Finding | None:
        """What the step that has ended says, with those before it."""
        self._num_steps += 1
        if self._num_steps <= WARM_UP:
            return None
        self._count(ended, 1)
        self._window.append(ended)
        if len(self._window) > WINDOW:
            self._count(self._window.popleft(), -1)
        if len(self._window) < FEWEST or self._seconds < self._lasting:
            return None
        share = self._num_waiting / len(self._window)
        if share >= self._share:
            return Finding(kind=self.kind, what=self._sentence(share)) if self._spell.begins(ended.step) else None
        if share > self._share / 2 or (since := self._spell.ends()) is None:
            return None
        what = f"{share:.0%} of the steps wait for batches now, after {ended.step - since} steps"
        return Finding(kind=self.kind, what=what, is_over=True)

    def _count(self, ended: StepEnded, sign: int) -> None:
        self._num_waiting += sign * (ended.data_seconds > MUCH * ended.seconds)
        self._seconds += sign * ended.seconds

    def _sentence(self, share: float) -> str:
        waits: Counter[str] = Counter()
        for ended in self._window:
            waits.update(ended.waits or {"data": ended.data_seconds})
        cause = max(waits, key=lambda name: waits[name])
        seconds = sum(ended.seconds for ended in self._window)
        waited = sum(ended.data_seconds for ended in self._window)
        is_fed = any(ended.received_bytes for ended in self._window)
        return (
            f"{share:.0%} of the last {len(self._window)} steps waited for their batches, {waited / seconds:.0%} of "
            f"their time, mostly for {cause}. {remedy(cause, is_fed=is_fed).rstrip('.')}"
        )
