"""LocalBatches: the micro-batches of one rank, made on this machine, in an order that depends on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Literal

from trainfleet.data.batches import IndexedBatches
from trainfleet.data.collate import torch_installed
from trainfleet.data.crew import Workers
from trainfleet.data.sampler import Short
from trainfleet.data.samples import Bad, IndexedMaker, Transform, name_of
from trainfleet.data.source import Source, is_indexed
from trainfleet.data.split import Part
from trainfleet.data.workers import StartMethod
from trainfleet.errors import DataError


class LocalBatches(IndexedBatches):
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
    part          only these samples of the source, such as Part(source, 0.1, held_out=False)
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
        part: Part | None = None,
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
            part=part,
        )
        self.maker = maker
        """What makes its batches, wherever that happens."""
        crew = Workers(
            maker=maker,
            workers=workers,
            prefetch=prefetch,
            bad=bad,
            timeout=timeout,
            restarts=restarts,
            start_method=start_method,
        )
        super().__init__(
            crew,
            num_samples=maker.num_samples,
            size=size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            shuffle=shuffle,
            short=short,
            epochs=epochs,
            name=name_of(source),
            pin=pin,
            as_numpy=collate == "numpy" or not torch_installed(),
            on_skip=on_skip,
        )

    def _indices(self, positions: Any, epoch: int) -> list[int]:
        return self.maker.indices(positions, epoch)

    def state_dict(self) -> dict[str, Any]:
        blocks, part = self.maker.blocks, self.maker.part
        window = {"window": blocks.window} if blocks is not None else {}
        return super().state_dict() | window | ({"part": repr(part)} if part is not None else {})

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        blocks, part = self.maker.blocks, self.maker.part
        if part is not None and state.get("part", repr(part)) != repr(part):
            raise DataError(
                f"The saved position is one of {state['part']}, and this stream is of {part}, so what was trained on "
                "would be held out, or the reverse. Keep data.evaluation as it was."
            )
        if blocks is not None and self.shuffle and state.get("window", blocks.window) != blocks.window:
            raise DataError(
                f"The saved position is one of an order in windows of {state['window']} shards, but this source has "
                f"windows of {blocks.window}, so it would repeat and lose samples. Keep window={state['window']}."
            )
        super().load_state_dict(state)
        self.maker.transform.seed = self.seed
