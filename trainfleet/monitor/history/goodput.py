"""Goodput: the share of a run's wall time that went into steps that count.

    goodput = (forward + backward + communication + optimizer of the steps that stand in the end)
              / (wall time from the first start to the end, or to now where the run goes on)

Everything else is in the wall time and not above the line: starts and restarts, steps that a failure or a rollback
undid, waiting for batches, copying them to the device, evaluation, blocking saves, observers, and stalls. Where a file
was written without phases, what a step took beside waiting for batches counts as computing.

In Google's words it is what *runtime goodput* and the time of *program goodput* say together, of a run that has its
machines (Google Cloud, "Introducing ML Productivity Goodput", 2024; arXiv 2502.06982); ByteRobust's *effective
training time ratio* (arXiv 2509.16293) is the same quotient with whole steps above the line. It says nothing about how
well the hardware is used within a forward: that is MFU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainfleet.events import CheckpointSaved, Evaluated, RunStarted, StepEnded
from trainfleet.monitor.limit import COMPUTING
from trainfleet.monitor.spent import OUTSIDE
from trainfleet.stopwatch import PRODUCTIVE

UNDONE = "undone steps"


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """Where the wall time of a run went."""

    seconds: float
    """From the first start to the end, or to now."""
    parts: Mapping[str, float]
    """Seconds by phase, of undone steps, and outside of steps; they sum to `seconds`."""

    @property
    def share(self) -> float:
        """Between 0 and 1; NaN before any time has passed."""
        if self.seconds <= 0:
            return math.nan
        return sum(self.parts.get(name, 0.0) for name in (*PRODUCTIVE, COMPUTING)) / self.seconds


class Ledger:
    """Takes the lines of a run in order and keeps account of the time; of steps that stand `Steps` does."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}
        self._first: float | None = None
        self._last = -math.inf
        self._latest = 0
        # Since the last step, by whether it stands: the next step's phases hold it, if there is one and it has phases.
        self._since: list[tuple[str, float, bool]] = []

    def add(self, row: Mapping[str, Any], stands: bool) -> None:
        """`row` as `read_rows` gives it."""
        time = row.get("time")
        if isinstance(time, (int, float)) and math.isfinite(time):
            self._first = time if self._first is None else self._first
            self._last = max(self._last, time)
        event = row["event"]
        if event == StepEnded.__name__:
            self._step(row, stands)
        elif event == Evaluated.__name__:
            self._since.append(("evaluation", finite(row.get("seconds")), stands))
        elif event == CheckpointSaved.__name__ and row.get("step") == self._latest:
            self._since.append(("checkpoint", finite(row.get("seconds")), stands))
        elif event == RunStarted.__name__:
            self._settle()

    def goodput(self, phases: Mapping[str, float], now: float | None = None) -> Goodput:
        """`phases`: seconds of the steps that stand. `now`: a time.time() for a run that goes on, else its last line
        is the end."""
        self._settle()
        last = self._last if now is None else max(self._last, now)
        seconds = max(0.0, last - self._first) if self._first is not None else 0.0
        parts = dict(phases)
        for name, booked in self._parts.items():
            parts[name] = parts.get(name, 0.0) + booked
        accounted = sum(parts.values())
        # A clock that was set back makes the wall time too short: no share may come out above 1.
        seconds = max(seconds, accounted)
        return Goodput(seconds=seconds, parts={**parts, OUTSIDE: seconds - accounted})

    def _step(self, row: Mapping[str, Any], stands: bool) -> None:
        self._latest = row["step"]
        phases = phases_of(row) if self._since or not stands else {}
        if self._since:
            if COMPUTING in phases:  # written without phases: the evaluation before it is in none
                self._settle()
            self._since.clear()
        if not stands:
            self._book(UNDONE, sum(phases.values()), stands)

    def _settle(self) -> None:
        """What came after the last step is in no step's phases."""
        for name, seconds, stands in self._since:
            self._book(name, seconds, stands)
        self._since.clear()

    def _book(self, name: str, seconds: float, stands: bool) -> None:
        name = name if stands else UNDONE
        self._parts[name] = self._parts.get(name, 0.0) + max(0.0, seconds)


def phases_of(row: Mapping[str, Any]) -> Mapping[str, float]:
    """Seconds by phase of a step's row, finite ones; computing and data where it was written without phases."""
    phases = row.get("phases")
    if not isinstance(phases, dict) or not phases:
        seconds, data = finite(row.get("seconds")), finite(row.get("data_seconds"))
        return {"data": max(0.0, min(seconds, data)), COMPUTING: max(0.0, seconds - data)}
    try:
        if 0 <= sum(phases.values()) < math.inf:
            return phases
    except TypeError:
        pass
    return {phase: max(0.0, finite(seconds)) for phase, seconds in phases.items()}


def finite(value: Any) -> float:
    """A number that can be added up; 0 for what is none."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0
