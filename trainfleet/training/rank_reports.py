"""RankReports: every so many steps each rank tells the others what it measured, and all hear it."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainfleet.comm.group import Group
from trainfleet.events import Event, RanksReported, StepEnded, Tracked
from trainfleet.monitor import private_bytes
from trainfleet.tracks import Tracks, reduced


class RankReports:
    """Collects the steps of this rank, and what it tracked, from one report to the next."""

    def __init__(
        self,
        group: Group,
        tracks: Tracks,
        *,
        every: int,
        device: str,
        system: Callable[[], Mapping[str, float]] | None = None,
        tell: Callable[[], Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        """`system` gives numbers of the machine, `tell` what watchers have to tell; each is called once a report."""
        self._group, self._tracks, self._every = group, tracks, every
        self._about = {"host": socket.gethostname(), "device": device}
        self._system, self._tell = system, tell
        self._begin()

    def _begin(self) -> None:
        self._last: StepEnded | None = None
        self._steps = 0
        self._seconds = 0.0
        self._phases: Counter[str] = Counter()

    def add(self, ended: StepEnded) -> list[Event]:
        """Count a step; where a report is due, which it is on all ranks alike, make it: a collective."""
        self._last = ended
        self._steps += 1
        self._seconds += ended.seconds + ended.between_seconds
        self._phases.update(ended.phases)
        return self._make(ended) if ended.step % self._every == 0 else []

    def finish(self) -> list[Event]:
        """The report of the steps since the last one; a collective, where there are such steps."""
        return self._make(self._last) if self._last is not None else []

    def _make(self, ended: StepEnded) -> list[Event]:
        own: dict[str, Any] = {
            **self._about,
            "seconds": self._seconds,
            "phases": {phase: seconds for phase, seconds in self._phases.items() if seconds},
            "memory_bytes": ended.memory_bytes,
            "private_bytes": private_bytes(),
            "system": dict(self._system()) if self._system is not None else {},
            "tracks": self._tracks.take(),
        }
        if self._tell is not None and (found := self._tell()):
            own["found"] = list(found)
        told = self._group.exchange(own)
        tracked = reduced([each.pop("tracks") for each in told])
        report = RanksReported(step=ended.step, steps=self._steps, ranks=told)
        self._begin()
        return [*(Tracked(step=step, name=name, value=value) for name, (step, value) in tracked.items()), report]
