"""Where a feeder's time goes: source, transform, network, or waiting to be asked."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

_RECENT = 2048


class Spent(NamedTuple):
    """Seconds since a feeder opened."""

    source: float = 0.0
    """Of all workers together."""
    transform: float = 0.0
    """Of all workers together; collate is part of it."""
    sending: float = 0.0
    """In which a batch at least was under way to a trainer."""


class Times:
    """Added up from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._source = self._transform = 0.0
        self._sent = _Union()
        self._sending: dict[int, float] = {}  # by thread, since when

    def made(self, source: float, transform: float) -> None:
        """Seconds that a worker took for a batch."""
        with self._lock:
            self._source += source
            self._transform += transform

    @contextmanager
    def sending(self) -> Iterator[None]:
        """While this thread sends a batch; several at a time count once."""
        with self._lock:
            self._sending[threading.get_ident()] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._sent.add(self._sending.pop(threading.get_ident()), time.monotonic())

    def arrived(self, begun: float, seconds: float) -> None:
        """A batch whose sending began then was under way for so long, as its trainer says: buffers on the way took it
        from us before."""
        with self._lock:
            self._sent.add(begun, min(begun + seconds, time.monotonic()))

    @property
    def spent(self) -> Spent:
        with self._lock:
            for begun in self._sending.values():
                self._sent.add(begun, time.monotonic())
            return Spent(self._source, self._transform, self._sent.seconds)


class _Union:
    """Seconds that are covered by stretches of time, each once, in whatever order they are told."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begins: list[float] = []
        self._ends: list[float] = []  # of stretches that do not touch, in order

    def add(self, begin: float, end: float) -> None:
        first, after = bisect_left(self._ends, begin), bisect_right(self._begins, end)
        if first < after:
            begin, end = min(begin, self._begins[first]), max(end, self._ends[after - 1])
            self.seconds -= sum(self._ends[first:after]) - sum(self._begins[first:after])
        self.seconds += max(0.0, end - begin)
        self._begins[first:after], self._ends[first:after] = [begin], [end]
        if len(self._begins) > 2 * _RECENT:  # what is older is told by nobody any more
            del self._begins[:_RECENT], self._ends[:_RECENT]


def shares(before: Spent, now: Spent, *, seconds: float, workers: int) -> dict[str, float]:
    """Of the workers' time between two looks, `seconds` apart: which share went where; 1 together.

    A worker that does nothing while batches are being sent waits for the network, else for trainers.
    """
    source, transform = now.source - before.source, now.transform - before.transform
    whole = max(seconds * workers, source + transform, 1e-9)  # a batch that took longer than the look comes at once
    source, transform = source / whole, transform / whole
    idle = max(0.0, 1.0 - source - transform)
    network = min(idle, (now.sending - before.sending) / max(seconds, 1e-9))
    return {"source": source, "transform": transform, "network": network, "waits for trainers": idle - network}
