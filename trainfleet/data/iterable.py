"""IterableBatches: the micro-batches of one rank from a source that can only be iterated.

Without `shards` every rank reads the whole source and takes its share of it: costly, but exact for any
number of ranks, and every rank sees the end at the same batch. With `shards` = S each rank reads its own:
position p of the stream is row p // S of shard p % S, each shard repeated without end, so that a whole
number of rows makes a step and one integer says where all shards are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import numpy as np

from trainfleet.data.batches import Batches
from trainfleet.data.collate import add_weights, torch_installed
from trainfleet.data.crew import Workers
from trainfleet.data.reader import Item, Place, Reader, check_shardable
from trainfleet.data.sampler import Share, Short, Span, check_places, share_of
from trainfleet.data.samples import Bad, Made, Progress, Transform, collated, name_of, sample_failed
from trainfleet.data.taken import Sample, of_share
from trainfleet.data.workers import StartMethod
from trainfleet.errors import DataError

logger = logging.getLogger(__name__)


@dataclass
class IterableMaker:
    """Micro-batches by reading on; a span that is not the next one is come to by reading again."""

    source: Any
    size: int
    rank: int
    world_size: int
    short: Short
    bad: Bad
    transform: Transform
    collate: Callable[[list[Any]], Any] | None
    epochs: int | None
    shards: int | None
    start: tuple[int, tuple[Place, ...]]
    """A position, and the place of each reader there; what the loop has consumed, once it has."""
    _readers: list[Reader] = field(default_factory=list)
    _at: int = -1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": [], "_at": -1}

    def make(self, span: Span, *, progress: Progress, poison: Collection[int]) -> Made:
        progress(span.begin)
        if self._at != span.begin:
            self._seek(span.begin)
        try:
            items = self._read(span.size // (self.shards or 1) * len(self._readers))
        except BaseException:
            self._at = -1
            raise
        self._at = span.end
        places = tuple(reader.here() for reader in self._readers)
        if self.shards is not None:
            return self._batch(items, items, np.ones(self.size, np.float32), False, places, progress)
        if len(items) < span.size:
            if not items or self.short == "drop":
                return Made(None, place=places, ended=True, num_dropped=len(items))
            span = Span(span.epoch, 0, len(items))
        begin = Span(span.epoch, 0, span.size)
        share = share_of(begin, rank=self.rank, world_size=self.world_size, size=self.size, short=self.short)
        chosen = [items[position] for position in share.positions]
        return self._batch(chosen, items, share.weights, share.weighted, places, progress)

    def _seek(self, position: int) -> None:
        began, places = self.start
        if self.shards is None:
            self._readers = [Reader(self.source, self.epochs, None, places[0])]
        else:
            mine = range(self.rank, self.shards, self.world_size)
            self._readers = [Reader(self.source, None, (s, self.shards), place) for s, place in zip(mine, places)]
        rows = (position - began) // (self.shards or 1)
        if rows:
            logger.info("Reading again %d samples of %s.", rows * len(self._readers), name_of(self.source))
        for _ in range(rows):
            for reader in self._readers:
                next(reader, None)

    def _read(self, count: int) -> list[Item]:
        items: list[Item] = []
        try:
            while len(items) < count:
                items += [next(reader) for reader in self._readers]
        except StopIteration:
            pass
        return items

    def _batch(
        self, chosen: list[Item], others: list[Item], weights: Any, weighted: bool, places: Any, progress: Progress
    ) -> Made:
        samples: list[Any] = []
        skipped: list[tuple[int, str]] = []
        bad_slots: list[int] = []
        with self.transform.kept_randomness():
            for slot, item in enumerate(chosen):
                progress(item.number)
                try:
                    samples.append(self.transform(item.sample, item.epoch, item.number))
                except Exception as exc:
                    if self.bad == "raise":
                        raise sample_failed(item.number, self.source, exc) from exc
                    samples.append(None)
                    bad_slots.append(slot)
                    if weights[slot]:
                        skipped.append((item.number, f"{type(exc).__name__}: {exc}"))
            if bad_slots:
                stand_in = self._stand_in(samples, bad_slots, others)
                for slot in bad_slots:
                    samples[slot], weights[slot] = stand_in, 0.0
        batch = collated(samples, self.collate, f"samples of {name_of(self.source)}")
        if weighted or self.bad == "skip":
            batch = add_weights(batch, weights)
        return Made(batch, tuple(skipped), places)

    def _stand_in(self, samples: list[Any], bad_slots: list[int], others: list[Item]) -> Any:
        for slot, sample in enumerate(samples):
            if slot not in bad_slots:
                return sample
        for item in others:
            try:
                return self.transform(item.sample, item.epoch, item.number)
            except Exception:
                continue  # counted where it belongs
        raise DataError(
            f"All {len(others)} samples of a batch of {name_of(self.source)} are bad. "
            "This is no matter of single samples: look at the source and the transform."
        )


class IterableBatches(Batches):
    """A BatchStream of one rank's micro-batches of `size` samples from any iterable that can be begun again.

    Where it begins again a batch may hold the end of one epoch and the begin of the next; `short` is the
    rule for the end of the last of `epochs`. Resuming uses the source's own `state_dict` where it has one,
    and else reads the consumed samples of the epoch again, which the log says.

    Elastic without `shards` to any number of ranks. With `shards`, only to one that divides them, and
    resuming reads every shard again from its begin. The source then has `shard(index, count)`, or is a
    torch IterableDataset that asks `get_worker_info()`. `workers` is at most one process: reading is one
    line. The other settings are those of `LocalBatches`.
    """

    def __init__(
        self,
        source: Any,
        *,
        size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        workers: int = 0,
        prefetch: int = 2,
        short: Short = "drop",
        bad: Bad = "raise",
        transform: Callable[..., Any] | None = None,
        collate: Callable[[list[Any]], Any] | Literal["numpy"] | None = None,
        pin: bool = False,
        epochs: int | None = None,
        shards: int | None = None,
        on_skip: Callable[[int, str], None] | None = None,
        timeout: timedelta = timedelta(minutes=2),
        restarts: int = 3,
        start_method: StartMethod | None = None,
    ) -> None:
        check_places(size * world_size, size=size, rank=rank, world_size=world_size, short=short, name=name_of(source))
        if shards is not None:
            _check_shards(source, shards, size, world_size, epochs)
        self.size, self.rank, self.world_size, self.shards, self.seed = size, rank, world_size, shards, seed
        self.dropped = 0
        """Samples left out at the end of the last epoch, of all ranks."""
        self._readers = 1 if shards is None else shards // world_size
        self._position = self._ahead = 0
        self._ended = False
        self._reading = IterableMaker(
            source=source,
            size=size,
            rank=rank,
            world_size=world_size,
            short=short,
            bad=bad,
            transform=Transform(transform, seed, source),
            collate=None if isinstance(collate, str) else collate,
            epochs=epochs,
            shards=shards,
            start=(0, (Place(),) * self._readers),
        )
        crew = Workers(
            maker=self._reading,
            workers=min(workers, 1),
            prefetch=max(1, prefetch * workers),
            bad=bad,
            timeout=timeout,
            restarts=restarts,
            start_method=start_method,
        )
        super().__init__(crew, pin=pin, as_numpy=collate == "numpy" or not torch_installed(), on_skip=on_skip)

    @property
    def epoch(self) -> int:
        """The epoch of the reader, of the first one where there are several."""
        return self._reading.start[1][0].epoch

    @property
    def position(self) -> int:
        """Samples that all ranks have consumed since the stream began."""
        return self._position

    @property
    def can_begin_again(self) -> bool:
        """Whether the source is no iterator, which gives each sample once."""
        return not hasattr(self._reading.source, "__next__")

    def rewind(self) -> None:
        """Begin again, for another pass of evaluation."""
        self._restart(0, (Place(),) * self._readers)

    def state_dict(self) -> dict[str, Any]:
        place = self._reading.start[1][0] if self.shards is None else Place()
        return {
            "position": self._position,
            "epoch": place.epoch,
            "offset": place.offset,
            "source": place.own,
            "shards": self.shards,
            "seed": self.seed,
            "dropped": self.dropped,
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        if state["shards"] != self.shards:
            raise DataError(
                f"The saved position counts samples of {state['shards'] or 'no'} shards, but data.shards is "
                f"{self.shards}. Keep data.shards as it was, at any number of ranks that divides it."
            )
        position, self.dropped = int(state["position"]), int(state["dropped"])
        if self.shards is not None:
            if position % self.shards:
                raise DataError(f"The saved position {position} is no whole number of rows of {self.shards} shards.")
            self._restart(position, (Place(),) * self._readers, began=0)
        else:
            self._restart(position, (Place(int(state["epoch"]), int(state["offset"]), state["source"]),))

    def _restart(self, position: int, places: tuple[Place, ...], began: int | None = None) -> None:
        if self._pool is not None:  # its process knows only the old place
            self._pool.close()
            self._pool = None
        self._reading.start = (position if began is None else began, places)
        self._reading._at = -1
        self._position, self._ended = position, False
        self._forget_plans()

    def _samples_of(self, span: Span, skipped: tuple[int, ...]) -> tuple[Sample, ...]:
        """By their positions in the stream, which is read in order: what is only iterated has no indices."""
        if self.shards is None:
            share = share_of(span, rank=self.rank, world_size=self.world_size, size=self.size, short="drop")
            return of_share(share, epoch=None, indices=None)
        # Row by row, this rank's shards in their order.
        first, mine = span.begin // self.shards, range(self.rank, self.shards, self.world_size)
        rows = span.size // self.shards
        positions = np.array([(first + row) * self.shards + shard for row in range(rows) for shard in mine])
        share = Share(positions, np.ones(len(positions), np.float32), False)
        return of_share(share, epoch=None, indices=None, shards=self.shards)

    def _advance(self) -> tuple[Span, int] | None:
        if self._ended:
            return None
        span = Span(0, self._ahead, self._ahead + self.size * self.world_size)
        self._ahead = span.end
        return span, 0

    def _consumed(self, span: Span, dropped: int, made: Made) -> None:
        self._reading.start = (span.end, made.place)
        if made.ended:
            self.dropped += made.num_dropped
            self._ended = True
            self._planned.clear()
            if self._pool is not None:
                self._pool.forget()
        else:
            self._position = span.end

    def _rewind_plans(self) -> None:
        self._ahead = self._position


def _check_shards(source: Any, shards: int, size: int, world_size: int, epochs: int | None) -> None:
    check_shardable(source)
    if epochs is not None:
        raise DataError(
            f"epochs={epochs} with shards={shards}: no rank can know when the others' shards end, so they would stop "
            "at different batches. Leave epochs out, or leave shards out."
        )
    if shards % world_size or size * world_size % shards:
        raise DataError(
            f"shards={shards} with {world_size} ranks of {size} samples: shards must be a multiple of the ranks, and "
            f"{size} x {world_size} = {size * world_size} a multiple of shards. Try shards={world_size}."
        )
