"""What every stream of batches has in common, and what those of an indexable dataset share: the order and the place."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from trainfleet.data.collate import to_numpy, to_torch
from trainfleet.data.crew import Crew, Pool
from trainfleet.data.sampler import Short, Span, check_places, check_same_source, next_span, share_of
from trainfleet.data.samples import Made
from trainfleet.data.taken import Sample, of_share
from trainfleet.data.waits import Waits
from trainfleet.errors import DataError

logger = logging.getLogger(__name__)

MOST_TAKEN = 4096
"""Batches whose samples can be named afterwards."""


class Batches:
    """What every stream has in common: batches from a crew, ahead of the loop and in order.

    A subclass says what comes next (`_advance`) and what is remembered (`_consumed`).
    """

    def __init__(self, crew: Crew, *, pin: bool, as_numpy: bool, on_skip: Callable[[int, str], None] | None) -> None:
        self.skipped = 0
        """Bad samples left out of this rank's consumed batches."""
        self.waits = Waits()
        """What the loop waited for, so far."""
        self.crew = crew
        self._pin, self._on_skip, self._as_numpy = pin, on_skip, as_numpy
        self._pool: Pool | None = None
        self._planned: deque[tuple[int, Span, int]] = deque()  # task, span, samples dropped on the way to it
        self._next_task = 0
        self._taken: deque[tuple[Span, tuple[int, ...]]] = deque(maxlen=MOST_TAKEN)  # span, bad samples in it
        self._closed = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._closed:
            raise DataError("This stream of batches is closed; open another.")
        self._plan_ahead()
        if not self._planned:
            raise StopIteration
        task, span, dropped = self._planned[0]
        begun = time.perf_counter()
        try:
            made = self._pool.receive(task) if self._pool is not None else self.crew.make(span)
        except BaseException:
            self._forget_plans()  # the next call tries the same span again
            raise
        self.waits.add(time.perf_counter() - begun, made)
        self._planned.popleft()
        self._consumed(span, dropped, made)
        if made.ended:
            raise StopIteration
        self._taken.append((span, tuple(index for index, _ in made.skipped)))
        # Workers go on while the loop computes.
        self._plan_ahead()
        if made.skipped:
            self._tell_skipped(made.skipped)
        return to_numpy(made.batch) if self._as_numpy else to_torch(made.batch, pin=self._pin)

    def taken(self, count: int) -> list[tuple[Sample, ...]]:
        """Which samples the last `count` batches held, by slot, the oldest first; fewer where fewer were taken."""
        last = list(self._taken)[-count:] if count > 0 else []
        return [self._samples_of(span, skipped) for span, skipped in last]

    def _samples_of(self, span: Span, skipped: tuple[int, ...]) -> tuple[Sample, ...]:
        raise NotImplementedError

    def close(self) -> None:
        """End the workers; may be called twice."""
        self._closed = True
        self._planned.clear()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def worker_pids(self) -> list[int]:
        return self._pool.pids if self._pool is not None else []

    def _advance(self) -> tuple[Span, int] | None:
        raise NotImplementedError

    def _consumed(self, span: Span, dropped: int, made: Made) -> None:
        raise NotImplementedError

    def _rewind_plans(self) -> None:
        """Plan again from what was consumed."""
        raise NotImplementedError

    def _plan_ahead(self) -> None:
        if self._pool is None:
            self._pool = self.crew.open()
        while len(self._planned) < self.crew.depth:
            ahead = self._advance()
            if ahead is None:
                return
            self._planned.append((self._next_task, *ahead))
            if self._pool is not None:
                self._pool.submit(self._next_task, ahead[0])
            self._next_task += 1

    def _forget_plans(self) -> None:
        self._planned.clear()
        if self._pool is not None:
            self._pool.forget()
        self._rewind_plans()

    def _tell_skipped(self, skipped: tuple[tuple[int, str], ...]) -> None:
        self.skipped += len(skipped)
        index, reason = skipped[0]
        if self._on_skip is not None:
            self._on_skip(len(skipped), f"sample {index}: {reason}")
        else:
            logger.warning(
                "%d bad samples left out, %d so far; the first is sample %d: %s",
                len(skipped),
                self.skipped,
                index,
                reason,
            )


class IndexedBatches(Batches):
    """One rank's part of the order of an indexable dataset, whoever makes the batches.

    Its place is (epoch, position), the same on all ranks.
    """

    def __init__(
        self,
        crew: Crew,
        *,
        num_samples: int,
        size: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        short: Short,
        epochs: int | None,
        name: str,
        pin: bool,
        as_numpy: bool,
        on_skip: Callable[[int, str], None] | None,
    ) -> None:
        check_places(num_samples, size=size, rank=rank, world_size=world_size, short=short, name=name)
        self.num_samples, self.size, self.rank, self.world_size = num_samples, size, rank, world_size
        self.shuffle, self.short, self.epochs = shuffle, short, epochs
        self.dropped = 0
        """Samples left out at the ends of epochs so far, of all ranks."""
        self.seed = seed
        self._place = self._ahead = (0, 0)
        super().__init__(crew, pin=pin, as_numpy=as_numpy, on_skip=on_skip)

    @property
    def epoch(self) -> int:
        """The epoch of the last batch; the next may begin another."""
        return self._place[0]

    @property
    def position(self) -> int:
        """Samples of this epoch that all ranks have consumed."""
        return self._place[1]

    @property
    def epochs_done(self) -> int:
        """Epochs of which nothing is left: the number of that which the next batch belongs to, from 0."""
        span, _ = next_span(
            *self._place, num_samples=self.num_samples, step=self.size * self.world_size, short=self.short
        )
        return span.epoch

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of this rank, and of every other, in a whole epoch."""
        whole, rest = divmod(self.num_samples, self.size * self.world_size)
        return whole + (rest > 0 and self.short != "drop")

    def rewind(self) -> None:
        """Begin again with the first epoch, for another pass of evaluation."""
        self._place = (0, 0)
        self._forget_plans()

    def _samples_of(self, span: Span, skipped: tuple[int, ...]) -> tuple[Sample, ...]:
        share = share_of(span, rank=self.rank, world_size=self.world_size, size=self.size, short=self.short)
        return of_share(share, epoch=span.epoch, indices=self._indices(share.positions, span.epoch), skipped=skipped)

    def _indices(self, positions: Any, epoch: int) -> list[int] | None:
        """In the source; None where this process cannot know them."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        epoch, position = self._place
        return {
            "epoch": epoch,
            "position": position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "samples": self.num_samples,
            "dropped": self.dropped,
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Go on where `state` was taken, at this number of ranks and this size."""
        check_same_source(state, self.num_samples)
        if bool(state["shuffle"]) != self.shuffle:
            raise DataError(
                f"The saved position is one of an order with shuffle={state['shuffle']}, but this stream has "
                f"shuffle={self.shuffle}, so it would repeat and lose samples. Keep data.shuffle as it was."
            )
        if int(state["seed"]) != self.seed:
            logger.warning(
                "The data goes on with the seed %s that its position belongs to, not %s.", state["seed"], self.seed
            )
            self.seed = int(state["seed"])
            if self._pool is not None:  # it has the old one
                self._pool.close()
                self._pool = None
        self._place = (int(state["epoch"]), int(state["position"]))
        self.dropped = int(state["dropped"])
        self._forget_plans()

    def _advance(self) -> tuple[Span, int] | None:
        epoch, position = self._ahead
        step = self.size * self.world_size
        span, dropped = next_span(epoch, position, num_samples=self.num_samples, step=step, short=self.short)
        if self.epochs is not None and span.epoch >= self.epochs:
            return None
        self._ahead = (span.epoch, span.end)
        return span, dropped

    def _consumed(self, span: Span, dropped: int, made: Made) -> None:
        self._place = (span.epoch, span.end)
        self.dropped += dropped

    def _rewind_plans(self) -> None:
        self._ahead = self._place
