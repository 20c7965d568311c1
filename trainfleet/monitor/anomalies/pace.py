"""Pace: whether steps have become slower than they were."""

from __future__ import annotations

import statistics
from collections import deque

from trainfleet.events import StepEnded
from trainfleet.monitor.anomalies.finding import Finding, Spell
from trainfleet.monitor.units import readable_number

BLOCK = 20
"""Steps whose median counts as one measurement: a slow step among them does not move it."""
REMEMBERED = 50
"""Blocks that the usual is the median of."""
ENOUGH = 2
"""Blocks that make a usual, after the first, which warms up."""


class Pace:
    """Compares the time a token takes with what it usually took. What lies between steps does not count."""

    kind = "throughput_drop"

    def __init__(self, *, factor: float, lasting_seconds: float) -> None:
        self._factor, self._lasting = factor, lasting_seconds
        self._block: list[float] = []
        self._block_seconds = 0.0
        self._blocks: deque[float] = deque(maxlen=REMEMBERED)
        self._num_blocks = 0
        self._slow_seconds = 0.0
        self._spell = Spell()

    def end(self, ended: StepEnded) -> Finding | None:
        """What the step that has ended says, with those before it."""
        self._block.append(ended.seconds / max(1, ended.tokens))
        self._block_seconds += ended.seconds
        if len(self._block) < BLOCK:
            return None
        now, seconds = statistics.median(self._block), self._block_seconds
        self._block, self._block_seconds = [], 0.0
        self._num_blocks += 1
        if self._num_blocks == 1:
            return None
        usual = statistics.median(self._blocks) if len(self._blocks) >= ENOUGH else None
        if usual is None or now <= self._factor * usual:
            self._blocks.append(now)
            self._slow_seconds = 0.0
            return self._over(ended.step, now)
        self._slow_seconds += seconds
        if self._slow_seconds < self._lasting or not self._spell.begins(ended.step):
            return None
        what = (
            f"The throughput is {readable_number(1 / now)} tokens/s, {usual / now:.0%} of the usual "
            f"{readable_number(1 / usual)}, for {self._slow_seconds:.0f} s"
        )
        return Finding(kind=self.kind, what=what)

    def _over(self, step: int, now: float) -> Finding | None:
        since = self._spell.ends()
        if since is None:
            return None
        what = f"The throughput is {readable_number(1 / now)} tokens/s again, after {step - since} steps"
        return Finding(kind=self.kind, what=what, is_over=True)
