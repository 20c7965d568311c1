"""Who makes a stream's batches: this process when asked, worker processes ahead, or feeders on other hosts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from trainfleet.data.sampler import Span
from trainfleet.data.samples import Bad, Made, Maker
from trainfleet.data.workers import StartMethod, WorkerPool
from trainfleet.errors import DataError


class Pool(Protocol):
    """Makes batches ahead: several tasks are submitted, then received in any order."""

    def submit(self, task: int, span: Span) -> None: ...

    def receive(self, task: int) -> Made: ...

    def forget(self) -> None:
        """Drop every submitted task."""

    def close(self) -> None: ...

    @property
    def pids(self) -> list[int]:
        """Its processes on this host."""


class Crew(Protocol):
    """A pool to be opened, and how far ahead of the loop it makes batches."""

    @property
    def depth(self) -> int: ...

    def open(self) -> Pool | None:
        """None where batches are made when asked, by `make`."""

    def make(self, span: Span) -> Made: ...


@dataclass(kw_only=True)
class Workers:
    """A crew of worker processes on this host, or none: then batches are made in the loop."""

    maker: Maker
    workers: int = 0
    prefetch: int = 2
    bad: Bad = "raise"
    timeout: timedelta = timedelta(minutes=2)
    restarts: int = 3
    start_method: StartMethod | None = None

    def __post_init__(self) -> None:
        if self.workers < 0 or self.prefetch < 1:
            raise DataError(
                f"workers={self.workers} and prefetch={self.prefetch}; "
                "use workers of 0 or more and prefetch of 1 or more."
            )
        if self.bad not in ("raise", "skip"):
            raise DataError(f"bad is {self.bad!r}; use 'raise' or 'skip'.")

    @property
    def depth(self) -> int:
        return max(1, self.workers * self.prefetch)

    def open(self) -> WorkerPool | None:
        if not self.workers:
            return None
        return WorkerPool(
            self.maker,
            workers=self.workers,
            bad=self.bad,
            timeout=self.timeout,
            restarts=self.restarts,
            start_method=self.start_method,
        )

    def make(self, span: Span) -> Made:
        return self.maker.make(span, progress=lambda index: None, poison=())
