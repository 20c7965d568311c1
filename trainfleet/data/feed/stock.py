"""What a feeder has: its streams, how any of their units is made, and what tells feeders apart."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainfleet.batch import map_arrays
from trainfleet.data.feed.terms import Offer, Terms, Unit
from trainfleet.data.loader import LocalBatches
from trainfleet.data.sampler import Span, check_places
from trainfleet.data.samples import IndexedMaker, Made, Progress, Transform, name_of
from trainfleet.data.source import blocks_of
from trainfleet.errors import DataError

MOST_TERMS = 256


@dataclass
class Stock:
    """Makes units of several streams; picklable if its parts are."""

    streams: Mapping[str, LocalBatches]
    _makers: dict[Terms, IndexedMaker] = field(default_factory=dict)

    def offers(self) -> dict[str, Offer]:
        """Each stream as a trainer gets it that asks for nothing else."""
        return {
            name: Offer(
                samples=stream.num_samples,
                size=stream.size,
                seed=stream.seed,
                shuffle=stream.shuffle,
                short=stream.short,
                bad=stream.maker.bad,
                source=name_of(stream.maker.source)[:200],
                digest=digest_of(stream.maker),
                plain=stream.maker.part is None and (stream.maker.blocks is None or stream.maker.blocks.whole),
            )
            for name, stream in self.streams.items()
        }

    def check(self, unit: Unit) -> None:
        """DataError for what these streams do not have."""
        terms = unit.terms
        if terms.stream not in self.streams:
            raise DataError(f"There is no stream {terms.stream[:40]!r} here, but {', '.join(self.streams)}.")
        samples = self.streams[terms.stream].num_samples
        check_places(
            samples,
            size=terms.size,
            rank=terms.rank,
            world_size=terms.world_size,
            short=terms.short,
            name=f"The stream {terms.stream}",
        )
        if unit.end > samples or unit.size > terms.size * terms.world_size:
            raise DataError(
                f"Positions {unit.begin} to {unit.end - 1} are no micro-batch of {terms.world_size} x {terms.size} "
                f"among {samples} samples."
            )

    def make(self, span: Span, *, progress: Progress, poison: Collection[int]) -> Made:
        assert isinstance(span, Unit)
        if span.terms not in self._makers:
            if len(self._makers) >= MOST_TERMS:  # a trainer that thinks of ever new ones
                self._makers.clear()
            self._makers[span.terms] = self._maker(span.terms)
        return self._makers[span.terms].make(span, progress=progress, poison=poison)

    def _maker(self, terms: Terms) -> IndexedMaker:
        ours = self.streams[terms.stream].maker
        return dataclasses.replace(
            ours,
            size=terms.size,
            rank=terms.rank,
            world_size=terms.world_size,
            shuffle=terms.shuffle,
            short=terms.short,
            bad=terms.bad,
            transform=Transform(ours.transform.function, terms.seed, ours.source),
        )


def digest_of(maker: IndexedMaker) -> str:
    """Of the number of samples, their blocks, the first, middle and last one as they are; of transform and collate."""
    source = maker.source
    hashed = hashlib.blake2b(digest_size=16)
    with maker.transform.kept_randomness():
        for index in sorted({0, len(source) // 2, len(source) - 1}):
            maker.transform.seed_globals(0, index)
            try:
                _hash_sample(hashed, source[index])
            except Exception as exc:  # a bad sample is one on every feeder
                hashed.update(type(exc).__name__.encode())
    words = [len(source), type(source).__qualname__, _identity(maker.transform.function), _identity(maker.collate)]
    if (blocks := blocks_of(source)) is not None:
        words += [blocks.sizes, blocks.window]
    if maker.part is not None:
        words.append(repr(maker.part))
    hashed.update(repr(words).encode())
    return hashed.hexdigest()


def _hash_sample(hashed: Any, sample: Any) -> None:
    def put(array: Any) -> str:
        plain = np.asarray(array.float().cpu() if str(array.dtype) == "torch.bfloat16" else array)
        hashed.update(f"{plain.dtype} {plain.shape}".encode())
        hashed.update(repr(plain.tolist()).encode() if plain.dtype.hasobject else np.ascontiguousarray(plain).data)
        return "array"

    hashed.update(_without_addresses(repr(map_arrays(put, sample))))


def _identity(function: Any) -> str:
    """What a callable is and does: its name and its source text, or the words of an object."""
    if function is None:
        return ""
    named = function if hasattr(function, "__qualname__") else type(function)
    try:
        text = inspect.getsource(named)
    except (OSError, TypeError):
        text = ""
    words = "" if named is function else _without_addresses(repr(function)).decode()
    return f"{named.__qualname__} {words} {text}"


def _without_addresses(words: str) -> bytes:
    return re.sub(r" at 0x[0-9a-f]+", "", words).encode()
