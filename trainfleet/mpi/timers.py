"""Where the time of each phase goes: computation or communication, and over ranks the least, the median, the most.

timers = Timers(group)
group = timers.group                    # the same group; waiting in it counts as communication
with timers("backward"):
    ...
timers.gathered()["backward"].communication.median
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from trainfleet.comm.group import Array, Group, Json, Reduction, Work


@dataclass(frozen=True, slots=True)
class OverRanks:
    """Seconds on the fastest rank, the one in the middle, and the slowest."""

    minimum: float
    median: float
    maximum: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    computation: OverRanks
    communication: OverRanks
    count: int
    """How often the phase was entered here."""


class Timers:
    """Seconds of each phase on this rank. Phases do not nest; what lies outside of all of them is not counted."""

    def __init__(self, group: Group) -> None:
        self.seconds: dict[str, list[float]] = {}
        """By phase: in all, of which communication, and how often."""
        self.group: Any = self.timed(group)
        self._plain = group
        self._phase: list[float] | None = None

    def timed(self, group: Group) -> TimedGroup:
        """A group whose calls and waits count as the communication of the phase they happen in."""
        return TimedGroup(group, self)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._phase is not None:
            raise RuntimeError(f"The phase {phase!r} begins within another; phases do not nest.")
        self._phase = self.seconds.setdefault(phase, [0.0, 0.0, 0])
        began = time.perf_counter()
        try:
            yield
        finally:
            self._phase[0] += time.perf_counter() - began
            self._phase[2] += 1
            self._phase = None

    def add_communication(self, seconds: float) -> None:
        if self._phase is not None:
            self._phase[1] += seconds

    def gathered(self) -> dict[str, Phase]:
        """Every phase over all ranks; all of them call it. A phase that some never entered counts as 0 there."""
        everyone = self._plain.exchange(self.seconds)
        names = dict.fromkeys(name for seconds in everyone for name in seconds)
        found = {}
        for name in names:
            rows = [seconds.get(name, [0.0, 0.0, 0]) for seconds in everyone]
            found[name] = Phase(
                computation=_over([whole - waited for whole, waited, _ in rows]),
                communication=_over([waited for _, waited, _ in rows]),
                count=int(self.seconds.get(name, [0, 0, 0])[2]),
            )
        return found

    def reset(self) -> None:
        self.seconds.clear()


class TimedGroup:
    """A Group, and Links where the one within has them, that tells the timers how long each call took."""

    def __init__(self, group: Any, timers: Timers) -> None:
        self._group = group
        self._timers = timers
        self.rank: int = group.rank
        self.size: int = group.size

    def all_reduce_(self, array: Array, op: Reduction = "sum") -> Work:
        return self._under_way(self._timed(self._group.all_reduce_, array, op))

    def broadcast_(self, array: Array, source: int = 0) -> Work:
        return self._under_way(self._timed(self._group.broadcast_, array, source))

    def all_gather(self, array: Array) -> list[Array]:
        return self._timed(self._group.all_gather, array)  # type: ignore[no-any-return]

    def reduce_scatter(self, array: Array, op: Literal["sum", "mean"] = "sum") -> Array:
        return self._timed(self._group.reduce_scatter, array, op)

    def exchange(self, value: Json) -> list[Json]:
        return self._timed(self._group.exchange, value)  # type: ignore[no-any-return]

    def barrier(self, timeout: timedelta | None = None) -> None:
        self._timed(self._group.barrier, timeout)

    def split(self, colour: int, name: str = "") -> TimedGroup:
        return TimedGroup(self._group.split(colour, name), self._timers)

    def send(self, array: Array, to: int) -> Work:
        return self._under_way(self._timed(self._group.send, array, to))

    def recv_(self, array: Array, source: int) -> Work:
        return self._under_way(self._timed(self._group.recv_, array, source))

    def all_to_all(self, arrays: Sequence[Array]) -> list[Array]:
        return self._timed(self._group.all_to_all, arrays)  # type: ignore[no-any-return]

    def _timed(self, call: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            self._timers.add_communication(time.perf_counter() - began)

    def _under_way(self, work: Work) -> Work:
        return _TimedWork(work, self)


class _TimedWork:
    def __init__(self, work: Work, group: TimedGroup) -> None:
        self._work = work
        self._group = group

    def wait(self, timeout: timedelta | None = None) -> None:
        self._group._timed(self._work.wait, timeout)


def _over(seconds: list[float]) -> OverRanks:
    return OverRanks(min(seconds), statistics.median(seconds), max(seconds))
