"""What a step is fed with: its micro-batches, and what the wait for them was for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from trainfleet.batch import Batch, BatchStream
from trainfleet.errors import DataError


class Supply:
    """Takes micro-batches from a stream; one that is timed (`waits`, `ready` of data streams) is asked what for."""

    def __init__(self, batches: BatchStream | Iterable[Batch], accumulation: int) -> None:
        self._batches: Iterator[Batch] = iter(batches)
        self._stream, self._accumulation = batches, accumulation
        self.seconds = 0.0
        """That the last `take` waited."""
        self.waits: dict[str, float] = {}
        """Of these, by cause; empty where the stream does not say."""
        self.received_bytes = 0
        """From other hosts, for the last `take`."""
        self.ended_epoch = False
        """Whether an epoch was over with the last `take`."""

    def take(self, step: int) -> list[Batch]:
        """The micro-batches of the step after `step`; DataError where the stream has ended."""
        begun, before, epochs = time.perf_counter(), self._waited(), self.epochs_done
        taken = [self._next(step) for _ in range(self._accumulation)]
        self.seconds = time.perf_counter() - begun
        waited, received = self._waited()
        self.waits = {cause: seconds - before[0].get(cause, 0.0) for cause, seconds in waited.items()}
        self.received_bytes = received - before[1]
        self.ended_epoch = epochs is not None and self.epochs_done != epochs
        return taken

    @property
    def epochs_done(self) -> int | None:
        """None for a stream that does not know where its epochs end."""
        done = getattr(self._stream, "epochs_done", None)
        return done if isinstance(done, int) else None

    @property
    def ready(self) -> int | None:
        """Batches of other hosts that are here and wait for the loop; None for a stream that is not fed."""
        ready = getattr(self._stream, "ready", None)
        return ready if isinstance(ready, int) else None

    def _waited(self) -> tuple[Mapping[str, float], int]:
        waits = getattr(self._stream, "waits", None)
        seconds = getattr(waits, "seconds", None)
        return (dict(seconds), int(getattr(waits, "num_bytes", 0))) if isinstance(seconds, Mapping) else ({}, 0)

    def _next(self, step: int) -> Batch:
        try:
            return next(self._batches)
        except StopIteration:
            raise DataError(
                f"The batches came to an end after step {step}. "
                "Give an endless stream, such as LocalBatches without `epochs`, or fewer steps."
            ) from None
