"""Disk: whether the disk that a run saves on will be full soon."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from trainfleet.events import CheckpointSaved, Event, StepEnded
from trainfleet.monitor.anomalies.finding import Finding, Spell
from trainfleet.monitor.anomalies.robust import slope
from trainfleet.monitor.units import readable_bytes, readable_duration

ENOUGH = 10
"""Measurements that make a trend."""


class Disk:
    """Looks at the free space now and then, and holds it against the trend and the size of a checkpoint."""

    kind = "disk_filling"

    def __init__(
        self,
        folder: Path,
        *,
        minutes: float,
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._folder, self._seconds = folder, 60 * minutes
        self._clock, self._free_bytes = clock, free_bytes
        self._every = min(30.0, self._seconds / 30)
        self._next = -1.0
        self._times: deque[float] = deque(maxlen=30)
        self._sizes: deque[float] = deque(maxlen=30)
        self._checkpoint_bytes = 0
        self._spell = Spell(calm=ENOUGH)

    def hear(self, event: Event) -> None:
        """Measure a checkpoint that was written below a folder of this host."""
        if isinstance(event, CheckpointSaved) and Path(event.path).is_dir():
            self._checkpoint_bytes = sum(path.stat().st_size for path in Path(event.path).rglob("*") if path.is_file())

    def end(self, ended: StepEnded) -> Finding | None:
        """What the disk says, where it is time to look."""
        now = self._clock()
        if now < self._next:
            return None
        self._next = now + self._every
        try:
            free = self._free_bytes(self._folder)
        except OSError:  # whoever writes there says so
            return None
        self._times.append(now)
        self._sizes.append(free)
        what = self._sentence(free)
        if what is not None:
            return Finding(kind=self.kind, what=what) if self._spell.begins(ended.step) else None
        since = self._spell.ends()
        if since is None:
            return None
        what = f"{readable_bytes(free)} are free again in {self._folder}, after {ended.step - since} steps"
        return Finding(kind=self.kind, what=what, is_over=True)

    def _sentence(self, free: int) -> str | None:
        left = f"{readable_bytes(free)} are left in {self._folder}"
        if free < 2 * self._checkpoint_bytes:
            return f"{left}, and a checkpoint takes {readable_bytes(self._checkpoint_bytes)}"
        if len(self._times) < ENOUGH:
            return None
        a_second = -slope(self._times, self._sizes)
        if a_second <= 0 or free / a_second > self._seconds:
            return None
        return f"{left}, and at the rate of the last minutes it is full in {readable_duration(free / a_second)}"
