"""Where a run is: what the console's two views know, gathered from its events."""

from __future__ import annotations

import math
import time

from trainfleet.events import AnomalySeen, Evaluated, Restored, RunEnded, RunStarted, StepEnded, Tracked
from trainfleet.monitor.limit import COMPUTING, Limit, in_words
from trainfleet.monitor.spent import Spent
from trainfleet.monitor.throughput import Smoothed, Throughput
from trainfleet.monitor.units import readable_bytes

LEAST_WAITING = 2
"""Percent of the time that are worth a word on the console."""
BASELINE = "baseline/"
"""Tracked numbers and entries of a summary with this prefix are marks to compare with, not measurements."""


class Progress:
    """The run so far; a new RunStarted begins it again."""

    def __init__(self) -> None:
        self.steps: int | None = None
        """Those the run will have taken when it is done; None where nobody said."""
        self.last: StepEnded | None = None
        self.loss = Smoothed()
        self.throughput = Throughput()
        self.limit = Limit()
        self.spent = Spent()
        self.tracked: dict[str, float] = {}
        self.best_validation = math.inf

    def start(self, event: RunStarted) -> None:
        self.__init__()  # type: ignore[misc]
        self.steps = event.steps
        self.spent = Spent(event)

    def step(self, event: StepEnded) -> None:
        self.last = event
        self.loss.update(event.loss)
        self.throughput.update(event, now=time.monotonic())
        self.limit.update(event)
        self.spent.step(event)

    def restore(self, event: Restored) -> None:
        self.spent.restore(event)

    def track(self, event: Tracked) -> None:
        if not event.name.startswith(BASELINE):
            self.tracked[event.name] = event.value

    def evaluate(self, event: Evaluated) -> bool:
        """True where this evaluation is better than every one before it, of which there is at least one."""
        self.spent.evaluate(event)
        is_better = event.loss < self.best_validation
        is_first = math.isinf(self.best_validation)
        if is_better:
            self.best_validation = event.loss
        return is_better and not is_first

    def summary(self, event: RunEnded) -> dict[str, float | str]:
        """That of the run, with where its time went and the goodput of this start."""
        if not (parts := self.limit.percentages):
            return dict(event.summary)
        if not self.spent.is_known:
            return {**event.summary, "time": in_words(parts), "limit": self.limit.sentence}
        summary = {**event.summary, "time": in_words(self.spent.percentages(event.seconds))}
        waits = {cause: share for cause, share in parts.items() if cause != COMPUTING}
        if sum(waits.values()) >= LEAST_WAITING:
            summary["waits for data"] = f"{in_words(waits)} of the time in steps"
        return {
            **summary,
            "goodput": f"{100 * self.spent.goodput(event.seconds):.0f}% since this start",
            "limit": self.limit.sentence,
        }

    @property
    def waiting(self) -> tuple[int, str]:
        """Percent of the last steps' time in which they waited for batches, and what for: `source 25% network 3%`."""
        causes = {cause: share for cause, share in self.throughput.percentages.items() if cause != COMPUTING and share}
        known = " ".join(f"{cause} {share}%" for cause, share in causes.items() if cause != "data")
        return sum(causes.values()), known

    @property
    def feed(self) -> str:
        """How batches of feeders come in; empty where there are none."""
        if self.last is None or self.last.ready is None:
            return ""
        speed = self.throughput
        rates = f"{speed.steps_per_second:.1f} steps/s {readable_bytes(speed.received_bytes_per_second)}/s"
        return f"{rates} {self.last.ready} ready"

    @property
    def remaining_seconds(self) -> float:
        """NaN where it is not known."""
        if self.steps is None or self.last is None:
            return math.nan
        return self.throughput.remaining_seconds(max(0, self.steps - self.last.step))


def printable(text: str) -> str:
    """The text without what would move the cursor or ring the bell: a model may generate any byte."""
    return "".join(char if char in "\n\t" or char.isprintable() else "\N{MIDDLE DOT}" for char in text)


def printable_line(text: str) -> str:
    """The same on one line."""
    return " ".join(printable(text).split())


def anomaly_words(event: AnomalySeen) -> list[str]:
    """Where an anomaly arose, as far as it is known, and what was done about it."""
    return [
        *([f"rank {event.rank}"] if event.rank is not None else []),
        *([f"in {event.module}"] if event.module else []),
        *([f"saved in {event.path}"] if event.path else []),
        {"skip": "step skipped", "rollback": "rolled back", "stop": "run stopped"}.get(event.policy, "run goes on"),
    ]
