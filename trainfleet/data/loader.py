"""LocalBatches: the micro-batches of one rank, made on this machine, in an order that depends on nothing else."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal

from trainfleet.data.collate import to_numpy, to_torch, torch_installed
from trainfleet.data.sampler import Short, Span, check_places, check_same_source, next_span
from trainfleet.data.samples import Bad, IndexedMaker, Made, Maker, Transform, name_of
from trainfleet.data.source import Source, is_indexed
from trainfleet.data.workers import StartMethod, WorkerPool
from trainfleet.errors import DataError

logger = logging.getLogger(__name__)


class Batches:
    """What every local stream has in common: making batches ahead, in this process or in workers, in order.

    A subclass says what comes next (`_advance`) and what is remembered (`_consumed`).
    """

    def __init__(
        self,
        maker: Maker,
        *,
        workers: int,
        prefetch: int,
        bad: Bad,
        pin: bool,
        as_numpy: bool,
        timeout: timedelta,
        restarts: int,
        start_method: StartMethod | None,
        on_skip: Callable[[int, str], None] | None,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise DataError(
                f"workers={workers} and prefetch={prefetch}; use workers of 0 or more and prefetch of 1 or more."
            )
        if bad not in ("raise", "skip"):
            raise DataError(f"bad is {bad!r}; use 'raise' or 'skip'.")
        self.skipped = 0
        """Bad samples left out of this rank's consumed batches."""
        self._maker, self._workers, self._prefetch = maker, workers, prefetch
        self._bad, self._pin, self._on_skip, self._as_numpy = bad, pin, on_skip, as_numpy
        self._timeout, self._restarts, self._start_method = timeout, restarts, start_method
        self._pool: WorkerPool | None = None
        self._planned: deque[tuple[int, Span, int]] = deque()  # task, span, samples dropped on the way to it
        self._next_task = 0
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
        try:
            made = self._pool.receive(task) if self._pool is not None else self._make(span)
        except BaseException:
            self._forget_plans()  # the next call tries the same span again
            raise
        self._planned.popleft()
        self._consumed(span, dropped, made)
        if made.ended:
            raise StopIteration
        # Workers go on while the loop computes.
        self._plan_ahead()
        if made.skipped:
            self._tell_skipped(made.skipped)
        return to_numpy(made.batch) if self._as_numpy else to_torch(made.batch, pin=self._pin)

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
        if self._workers and self._pool is None:
            self._pool = WorkerPool(
                self._maker,
                workers=self._workers,
                bad=self._bad,
                timeout=self._timeout,
                restarts=self._restarts,
                start_method=self._start_method,
            )
        while len(self._planned) < max(1, self._workers * self._prefetch):
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

    def _make(self, span: Span) -> Made:
        return self._maker.make(span, progress=lambda index: None, poison=())

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


class LocalBatches(Batches):
    """A BatchStream of one rank's micro-batches of `size` samples, endless unless `epochs` is given.

    All ranks together take contiguous stretches of an order that is a function of (seed, epoch, position),
    so the stream of samples is the same for any number of ranks and workers, and `state_dict`, the same on
    all ranks, resumes at another number of ranks or another size without repeating or losing a sample.
    Batches made ahead by workers count only when the loop gets them.

    source        anything with len() and [index]; samples are dicts, tuples, dataclasses, arrays, numbers
    size          samples in a micro-batch of one rank
    workers       processes that make batches ahead, `prefetch` each; 0 makes them when asked
    short         the end of an epoch that is not a whole micro-batch on every rank. "drop": left out, counted
                  in `dropped`. "pad": filled up with repeated samples of weight 0. "keep": split evenly; if
                  it is fewer samples than ranks, those without one get a repeated sample of weight 0.
                  Every rank yields equally many micro-batches, and at least one sample in each.
    bad           a sample that raises, or kills two workers. "raise": DataError with its index. "skip":
                  its slot is filled with another sample at weight 0, and it is counted in `skipped`; the
                  others stay where they are. `on_skip(count, example)` is told, else the log.
    transform     sample -> sample, or (sample, rng) -> sample with a NumPy generator made of (seed, epoch,
                  index). Without `rng`, `random`, `numpy.random` and torch are seeded with the same.
    collate       None: stacked, as torch tensors where torch is installed; "numpy": stacked, as NumPy; or a
                  function from a list of samples to a batch
    pin           copy into pinned memory where there is a CUDA device
    epochs        stop after so many; `rewind()` begins again
    timeout       how long a worker may make no progress before it is replaced
    restarts      how many workers may be lost within a thousand batches

    Weights: with short="pad" or bad="skip" every batch carries one float32 a sample, 0 where the sample must
    not count; with short="keep" only a batch where a rank had none. A dict gains the key "weight", a tuple
    or list a last element, a dataclass its field `weight`; anything else becomes (batch, weight).
    """

    def __init__(
        self,
        source: Source,
        *,
        size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 0,
        prefetch: int = 2,
        short: Short = "drop",
        bad: Bad = "raise",
        transform: Callable[..., Any] | None = None,
        collate: Callable[[list[Any]], Any] | Literal["numpy"] | None = None,
        pin: bool = False,
        epochs: int | None = None,
        on_skip: Callable[[int, str], None] | None = None,
        timeout: timedelta = timedelta(minutes=2),
        restarts: int = 3,
        start_method: StartMethod | None = None,
    ) -> None:
        if not is_indexed(source):
            raise DataError(
                f"A {type(source).__name__} has no len() and [index]. Use IterableBatches for what is only iterated."
            )
        self.num_samples = len(source)
        check_places(self.num_samples, size=size, rank=rank, world_size=world_size, short=short, name=name_of(source))
        self.size, self.rank, self.world_size = size, rank, world_size
        self.shuffle, self.short, self.epochs = shuffle, short, epochs
        self.dropped = 0
        """Samples left out at the ends of epochs so far, of all ranks."""
        self._place = self._ahead = (0, 0)
        as_numpy = collate == "numpy" or not torch_installed()
        maker = IndexedMaker(
            source=source,
            size=size,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
            short=short,
            bad=bad,
            transform=Transform(transform, seed, source),
            collate=None if isinstance(collate, str) else collate,
        )
        self._indexed = maker
        super().__init__(
            maker,
            workers=workers,
            prefetch=prefetch,
            bad=bad,
            pin=pin,
            as_numpy=as_numpy,
            timeout=timeout,
            restarts=restarts,
            start_method=start_method,
            on_skip=on_skip,
        )

    @property
    def epoch(self) -> int:
        """The epoch of the last batch; the next may begin another."""
        return self._place[0]

    @property
    def position(self) -> int:
        """Samples of this epoch that all ranks have consumed."""
        return self._place[1]

    @property
    def seed(self) -> int:
        return self._indexed.transform.seed

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of this rank, and of every other, in a whole epoch."""
        whole, rest = divmod(self.num_samples, self.size * self.world_size)
        return whole + (rest > 0 and self.short != "drop")

    def rewind(self) -> None:
        """Begin again with the first epoch, for another pass of evaluation."""
        self._place = (0, 0)
        self._forget_plans()

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
            self._set_seed(int(state["seed"]))
        self._place = (int(state["epoch"]), int(state["position"]))
        self.dropped = int(state["dropped"])
        self._forget_plans()

    def _set_seed(self, seed: int) -> None:
        self._indexed.transform.seed = seed
        if self._pool is not None:  # its processes have the old one
            self._pool.close()
            self._pool = None

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
