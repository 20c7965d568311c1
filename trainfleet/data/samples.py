"""Making one rank's micro-batch out of a span: read, transform, leave out what is bad, collate."""

from __future__ import annotations

import hashlib
import inspect
import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias, cast

import numpy as np

from trainfleet.data.collate import add_weights, stack_samples
from trainfleet.data.order import Blocks, indices_at
from trainfleet.data.sampler import Share, Short, Span, share_of
from trainfleet.data.source import BlockSource, Source, blocks_of
from trainfleet.data.split import Part
from trainfleet.data.waits import Way
from trainfleet.errors import DataError
from trainfleet.imports import imported

Bad: TypeAlias = Literal["raise", "skip"]
Progress: TypeAlias = Callable[[int], None]
MASK = (1 << 64) - 1
STAND_IN_TRIES = 100  # a hundred bad samples in a row are no accident


@dataclass(frozen=True, slots=True)
class Made:
    """A micro-batch of one rank, and what happened on the way."""

    batch: Any
    skipped: tuple[tuple[int, str], ...] = ()
    """(index, reason) of the bad samples of this rank."""
    place: Any = None
    """Where the readers of an iterable are after this batch."""
    ended: bool = False
    """There is no batch: the last epoch of an iterable is over."""
    num_dropped: int = 0
    """Samples before that end which filled no batch."""
    spent: tuple[float, float] = field(default=(0.0, 0.0), compare=False)
    """Seconds in the source, and in all else of its making: transform, collate. Zero where nobody timed it."""
    way: Way | None = field(default=None, compare=False)
    """How it came here from a feeder."""
    num_bytes: int = field(default=0, compare=False)
    """That came over the network for it."""


class Maker(Protocol):
    """What a worker process does all day. `Made` must be a pure function of the arguments."""

    def make(self, span: Span, *, progress: Progress, poison: Collection[int]) -> Made: ...


@dataclass
class IndexedMaker:
    """Micro-batches of an indexable source; picklable if its parts are."""

    source: Source
    size: int
    rank: int
    world_size: int
    shuffle: bool
    short: Short
    bad: Bad
    transform: Transform
    collate: Callable[[list[Any]], Any] | None
    part: Part | None = None
    """Only these samples of the source; None: all of it."""
    _in_source: float = field(default=0.0, init=False, repr=False, compare=False)  # seconds, of the batch at hand

    @property
    def num_samples(self) -> int:
        return len(self.source) if self.part is None else len(self.part)

    @property
    def blocks(self) -> Blocks | None:
        """In which the samples lie together, where they do."""
        return blocks_of(self.source) if self.part is None else self.part.blocks

    def make(self, span: Span, *, progress: Progress, poison: Collection[int]) -> Made:
        share = share_of(span, rank=self.rank, world_size=self.world_size, size=self.size, short=self.short)
        begun = time.perf_counter()
        self._in_source = 0.0
        with self.transform.kept_randomness():
            made = self._make(span, share, progress, poison)
        return replace(made, spent=(self._in_source, time.perf_counter() - begun - self._in_source))

    def _make(self, span: Span, share: Share, progress: Progress, poison: Collection[int]) -> Made:
        samples: list[Any] = []
        weights = share.weights.copy()
        skipped: list[tuple[int, str]] = []
        bad_slots: list[int] = []
        indices = self.indices(share.positions, span.epoch)
        self._expect(span, progress)
        for slot, index in enumerate(indices):
            progress(index)
            try:
                samples.append(self._sample(index, span.epoch, poison))
            except Exception as exc:
                if self.bad == "raise":
                    raise sample_failed(index, self.source, exc) from exc
                samples.append(None)
                bad_slots.append(slot)
                if weights[slot]:
                    skipped.append((index, f"{type(exc).__name__}: {exc}"))
        if bad_slots:
            stand_in = self._stand_in(span, samples, bad_slots, poison, skipped)
            for slot in bad_slots:
                samples[slot], weights[slot] = stand_in, 0.0
        batch = collated(samples, self.collate, f"samples {indices[0]} to {indices[-1]} of {name_of(self.source)}")
        if share.weighted or self.bad == "skip":
            batch = add_weights(batch, weights)
        return Made(batch, tuple(skipped))

    def indices(self, positions: Any, epoch: int) -> list[int]:
        """In the source, of the samples at some positions of an epoch."""
        n, seed = self.num_samples, self.transform.seed
        order = indices_at(positions, num_samples=n, seed=seed, epoch=epoch, shuffle=self.shuffle, blocks=self.blocks)
        found: list[int] = (order if self.part is None else self.part.in_source(order)).tolist()
        return found

    def _expect(self, span: Span, progress: Progress) -> None:
        """Tell a source that fetches blocks which ones come, and whom to tell that it is at it."""
        if self.blocks is None:
            return
        source = cast(BlockSource, self.source)
        source.still_there = lambda: progress(-1)
        coming = self.blocks.coming(span.begin, seed=self.transform.seed, epoch=span.epoch, shuffle=self.shuffle)
        if self.part is not None:
            coming = (self.part.blocks_in_source(coming[0]), self.part.blocks_in_source(coming[1]))
        source.expect(*coming)

    def _sample(self, index: int, epoch: int, poison: Collection[int]) -> Any:
        if index in poison:
            raise DataError("it killed two worker processes")
        self.transform.seed_globals(epoch, index)  # the source itself may draw
        begun = time.perf_counter()
        try:
            sample = self.source[index]
        finally:
            self._in_source += time.perf_counter() - begun
        return self.transform(sample, epoch, index)

    def _stand_in(
        self,
        span: Span,
        samples: list[Any],
        bad_slots: list[int],
        poison: Collection[int],
        skipped: list[tuple[int, str]],
    ) -> Any:
        """A good sample to fill the slots of bad ones: of this batch, or the first that follows the span."""
        for slot, sample in enumerate(samples):
            if slot not in bad_slots:
                return sample
        following = (span.end + np.arange(STAND_IN_TRIES)) % self.num_samples
        for index in self.indices(following, span.epoch):
            try:
                return self._sample(index, span.epoch, poison)
            except Exception:
                continue  # counted when its own turn comes
        raise DataError(
            f"The {len(bad_slots)} samples of a batch of {name_of(self.source)} and the {STAND_IN_TRIES} after it "
            f"are all bad; the first: sample {skipped[0][0] if skipped else '?'}: {skipped[0][1] if skipped else '?'}. "
            "This is no matter of single samples: look at the source and the transform."
        )


class Transform:
    """The user's transform, if any, with the randomness of each sample made of (seed, epoch, index)."""

    def __init__(self, function: Callable[..., Any] | None, seed: int, source: Any) -> None:
        self.function, self.seed = function, seed
        self._takes_rng = takes_rng(function)
        ours = type(source).__module__.startswith("trainfleet.data.")
        self._seeds_globals = not ours or (function is not None and not self._takes_rng)

    def __call__(self, sample: Any, epoch: int, index: int) -> Any:
        self.seed_globals(epoch, index)
        if self.function is None:
            return sample
        return self.function(sample, sample_rng(self.seed, epoch, index)) if self._takes_rng else self.function(sample)

    def seed_globals(self, epoch: int, index: int) -> None:
        """Seed `random`, `numpy.random` and torch, for code that knows no generator of its own."""
        if not self._seeds_globals:
            return
        digest = hashlib.blake2b(f"{self.seed} {epoch} {index}".encode(), digest_size=12).digest()
        words = np.frombuffer(digest, "<u4").tolist()
        random.seed(words[0])
        np.random.seed(words[1])
        if (torch := imported("torch")) is not None:
            torch.default_generator.manual_seed(words[2])

    @contextmanager
    def kept_randomness(self) -> Iterator[None]:
        """Leave the global generators as they were: samples made in the training process must not move dropout."""
        if not self._seeds_globals:
            yield
            return
        torch = imported("torch")
        states = random.getstate(), np.random.get_state(), torch.get_rng_state() if torch is not None else None
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            if torch is not None and states[2] is not None:
                torch.set_rng_state(states[2])


def takes_rng(transform: Callable[..., Any] | None) -> bool:
    """Whether it is called as transform(sample, rng): its second parameter is required, or named `rng`."""
    if transform is None:
        return False
    try:
        parameters = list(inspect.signature(transform).parameters.values())
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and (positional[1].default is inspect.Parameter.empty or positional[1].name == "rng")


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The randomness of one sample in one epoch, the same wherever it is made."""
    return np.random.default_rng([seed & MASK, epoch, index])


def collated(samples: list[Any], collate: Callable[[list[Any]], Any] | None, what: str) -> Any:
    if collate is None:
        return stack_samples(samples)
    try:
        return collate(samples)
    except DataError:
        raise
    except Exception as exc:
        raise DataError(f"collate failed on {what}: {type(exc).__name__}: {exc}") from exc


def sample_failed(index: int, source: Any, exc: Exception) -> DataError:
    return DataError(
        f"Sample {index} of {name_of(source)} failed: {type(exc).__name__}: {exc}",
        hint=f"Look at it with source[{index}] and the transform; bad='skip' leaves such samples out and counts them.",
    )


def name_of(source: Any) -> str:
    ours = type(source).__module__.startswith("trainfleet.data.")
    return repr(source) if ours else f"the source {type(source).__name__}"
