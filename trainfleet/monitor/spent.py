"""Where the time of a run went since this start, by phase, while it goes on: what the console says at the end."""

from __future__ import annotations

from array import array

from trainfleet.events import Evaluated, Restored, RunStarted, StepEnded
from trainfleet.monitor.units import percentages
from trainfleet.stopwatch import PRODUCTIVE

OUTSIDE = "outside steps"
"""Starts, restarts, stalls, the end: what no step and no evaluation accounts for."""


class Spent:
    """Of this start alone; `monitor/history` knows all starts of a run, and defines goodput."""

    def __init__(self, event: RunStarted | None = None) -> None:
        self._begin = event.start_step if event else 0
        self._phases: dict[str, float] = {}
        self._productive = array("d")  # seconds of each step that stands: 8 bytes a step
        self._evaluated = 0.0  # since the last step: the phases of the next one hold it, if there is one

    def step(self, event: StepEnded) -> None:
        self._evaluated = 0.0
        for phase, seconds in event.phases.items():
            self._phases[phase] = self._phases.get(phase, 0.0) + seconds
        self._productive.append(sum(event.phases.get(phase, 0.0) for phase in PRODUCTIVE))

    def evaluate(self, event: Evaluated) -> None:
        self._evaluated += event.seconds

    def restore(self, event: Restored) -> None:
        """The steps after it are undone: their time was spent, and counts for nothing."""
        del self._productive[max(0, event.step - self._begin) :]

    @property
    def is_known(self) -> bool:
        """Whether steps came with phases."""
        return bool(self._phases)

    def percentages(self, seconds: float) -> dict[str, int]:
        """By phase and outside of steps, of so many seconds since the start; 100 together."""
        parts = dict(self._phases)
        if self._evaluated:
            parts["evaluation"] = parts.get("evaluation", 0.0) + self._evaluated
        return percentages({**parts, OUTSIDE: max(0.0, seconds - sum(parts.values()))})

    def goodput(self, seconds: float) -> float:
        """Of so many seconds since the start; 0 where nothing is known."""
        productive = sum(self._productive)
        whole = max(seconds, productive)
        return productive / whole if whole > 0 else 0.0
