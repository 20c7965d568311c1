"""Growth: whether a rank's memory grows and grows, as with a leak.

A window of reports is cut into four quarters. Memory grows where most of each quarter lies above most of the last one,
and the median rises each time by a fair part of the whole growth. Caches that fill up, one evaluation, one longer batch
make a step or a curve that flattens; a leak makes a line. Pages of files that are read through memory are not counted.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from trainfleet.events import RanksReported
from trainfleet.monitor.anomalies.finding import Finding, Spell
from trainfleet.monitor.units import readable_bytes

WARM_UP = 5
"""First reports that do not count."""
WINDOW = 40
"""Reports, and, for leaks that are slower, as many blocks of FAR reports."""
FAR = 16
LEAST_BYTES = 64 << 20
"""Growth of less is not told: allocators and caches move by that."""
FAIR = 0.15
"""Share of the growth that each of the three steps between quarters has at least; a line has a third."""
CALM = 0.25
"""Share of the growth that begins it below which it is over."""


class Growth:
    """Watches the memory of all ranks. All of them see the same reports."""

    kind = "memory_growth"

    def __init__(self, *, share: float) -> None:
        self._share = share
        self._num_reports = 0
        self._memories: dict[tuple[int, str], _Memory] = {}

    def hear(self, report: RanksReported) -> Finding | None:
        """What the report says, with those before it; of the first rank that has news."""
        self._num_reports += 1
        if self._num_reports <= WARM_UP:
            return None
        found = []
        for rank, each in enumerate(report.ranks):
            sizes = {"memory": each.get("private_bytes")}
            if each["device"] != "cpu":
                sizes[f"memory of {each['device']}"] = each["memory_bytes"]
            for name, size in sizes.items():
                if size:
                    memory = self._memories.setdefault((rank, name), _Memory(rank, name, self._share))
                    found.append(memory.look(report.step, int(size)))
        return next((finding for finding in found if finding is not None), None)


class _Memory:
    """One of a rank's: [step, bytes] of the last reports, and medians of those further back."""

    def __init__(self, rank: int, name: str, share: float) -> None:
        self._rank, self._name, self._share = rank, name, share
        self._near: deque[tuple[int, int]] = deque(maxlen=WINDOW)
        self._far: deque[tuple[int, int]] = deque(maxlen=WINDOW)
        self._block: list[int] = []
        self._spell = Spell(calm=WINDOW)

    def look(self, step: int, memory: int) -> Finding | None:
        self._near.append((step, memory))
        self._block.append(memory)
        if len(self._block) == FAR:
            self._far.append((step, int(statistics.median(self._block))))
            self._block = []
        is_calm = True
        for points in (self._near, self._far):
            if len(points) < WINDOW:
                continue
            grown, much = growth_of([size for _, size in points]), max(LEAST_BYTES, self._share * points[0][1])
            if grown >= much:
                return self._told(step, points, grown)
            is_calm &= grown < CALM * much
        since = self._spell.ends() if is_calm else None
        if since is None:
            return None
        now = readable_bytes(memory)
        what = f"The {self._name} of rank {self._rank} has stopped growing, at {now}, after {step - since} steps"
        return Finding(kind=Growth.kind, what=what, is_over=True, rank=self._rank)

    def _told(self, step: int, points: Sequence[tuple[int, int]], grown: float) -> Finding | None:
        if not self._spell.begins(step):
            return None
        steps = points[-1][0] - points[0][0]
        # From the middle of the first quarter to that of the last are three quarters of the window.
        a_step = grown / max(1.0, 0.75 * steps)
        what = (
            f"The {self._name} of rank {self._rank} grows by {readable_bytes(round(a_step))} a step, for {steps} "
            f"steps, to {readable_bytes(points[-1][1])}: something holds on to what steps leave behind"
        )
        return Finding(kind=Growth.kind, what=what, rank=self._rank)


def growth_of(sizes: Sequence[float]) -> float:
    """From the first quarter to the last where each quarter grew by a fair part of it; else 0."""
    quarter = len(sizes) // 4
    parts = [statistics.quantiles(sizes[i * quarter : (i + 1) * quarter]) for i in range(4)]
    grown = parts[-1][1] - parts[0][1]
    apart = all(after[0] > before[2] for before, after in pairwise(parts))
    return grown if apart and all(after[1] - before[1] >= FAIR * grown for before, after in pairwise(parts)) else 0.0
