"""A part of a source: what is held out for evaluation, or the rest, by its length, a fraction and a seed alone.

The source is cut into as many stretches as samples are to be held out, as long as each other within one sample, and of
each stretch one sample is held out, by a keyed hash. So what is held out comes from everywhere, also where samples are
sorted by class, both parts keep the order of the source, and which sample stands where is computed, never stored.
(Stratified random sampling with one sample a stratum: W. G. Cochran, Sampling Techniques, 3rd edition, 5A.)
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from trainfleet.data.order import Blocks, Indices, mixed
from trainfleet.data.source import Source, blocks_of
from trainfleet.errors import DataError


class Part:
    """The samples of `source` that are held out, or those that are not.

    Of a source in blocks that are fetched whole (shards), whole blocks are held out, as soon as the fraction is one
    block: to evaluate would otherwise fetch all of them. DataError for a fraction that leaves one of the parts empty.
    """

    def __init__(self, source: Source, fraction: float, *, seed: int = 0, held_out: bool) -> None:
        self.fraction, self.seed, self.held_out = fraction, seed, held_out
        self._whole = len(source)
        blocks = blocks_of(source)
        by_blocks = blocks is not None and len(blocks.sizes) * fraction >= 1 and len(blocks.sizes) > 1
        self._strata = _Strata(len(blocks.sizes) if by_blocks and blocks else self._whole, fraction, seed)
        self.blocks: Blocks | None = None
        """Its samples in blocks, where the source has blocks."""
        self._ids: Indices | None = None  # of these in the source
        self._begins: Indices | None = None  # of each in the source and here, where blocks are held out whole
        if blocks is not None:
            self._cut_blocks(blocks, whole=by_blocks)
        self._length = sum(self.blocks.sizes) if self.blocks is not None else self._strata.count(held_out)

    def _cut_blocks(self, blocks: Blocks, *, whole: bool) -> None:
        ends = np.cumsum(np.asarray(blocks.sizes, np.int64))
        if whole:
            self._ids = self._strata.at(np.arange(self._strata.count(self.held_out)), self.held_out)
            sizes = np.asarray(blocks.sizes, np.int64)[self._ids]
            self._begins = np.stack([(ends - blocks.sizes)[self._ids], np.cumsum(sizes) - sizes])
        else:
            sizes = np.diff(self._strata.before(ends, self.held_out), prepend=0)
            self._ids = np.flatnonzero(sizes)
            sizes = sizes[self._ids]
        self.blocks = Blocks(tuple(sizes.tolist()), blocks.window)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"Part({self.fraction} of {self._whole}, seed={self.seed}, held_out={self.held_out})"

    def in_source(self, places: Indices) -> Indices:
        """Which samples of the source stand at these places of the part."""
        if self._begins is None:
            return self._strata.at(places, self.held_out)
        in_source, here = self._begins
        nth = np.searchsorted(here, places, side="right") - 1
        found: Indices = in_source[nth] + places - here[nth]
        return found

    def blocks_in_source(self, blocks: list[int]) -> list[int]:
        """Which blocks of the source these blocks of the part are."""
        assert self._ids is not None
        found: list[int] = self._ids[blocks].tolist()
        return found


class _Strata:
    """`taken` of 0..n-1, one of each stretch, and all the others."""

    def __init__(self, n: int, fraction: float, seed: int) -> None:
        if not 0 < fraction < 1:
            raise DataError(f"A fraction of {fraction} is to be held out; it must be more than 0 and less than 1.")
        if n < 2:
            raise DataError(f"{fraction:g} of {n} samples cannot be held out: one for each part is the least.")
        self.n, self.taken = n, min(n - 1, max(1, round(n * fraction)))
        self._key = np.frombuffer(hashlib.shake_128(f"trainfleet split {seed}".encode()).digest(8), "<u8")[0]
        # Products of positions: exact in Python's integers where 64 bits would not hold them.
        self._type: Any = np.int64 if n < 1 << 31 else object

    def count(self, taken: bool) -> int:
        return self.taken if taken else self.n - self.taken

    def at(self, places: Indices, taken: bool) -> Indices:
        """The places-th of those taken, or of the others."""
        if taken:
            return self._taken(np.asarray(places, np.int64))
        # Before stretch j lie j*n//k - j = j*(n-k)//k others.
        others, wanted = self.n - self.taken, np.asarray(places).astype(self._type)
        stretch = -(-(wanted + 1) * self.taken // others) - 1
        found = (wanted + stretch).astype(np.int64)
        others_at: Indices = found + (found >= self._taken(stretch.astype(np.int64)))
        return others_at

    def before(self, ends: Indices, taken: bool) -> Indices:
        """How many of those taken, or of the others, are less than each of `ends`."""
        wanted = np.asarray(ends).astype(self._type)
        stretch = np.minimum(-(-(wanted + 1) * self.taken // self.n) - 1, self.taken - 1).astype(np.int64)
        fewer = stretch + (self._taken(stretch) < ends)
        counts: Indices = fewer if taken else np.asarray(ends, np.int64) - fewer
        return counts

    def _taken(self, stretch: Indices) -> Indices:
        exact = stretch.astype(self._type)
        begins = (exact * self.n // self.taken).astype(np.int64)
        lengths = ((exact + 1) * self.n // self.taken).astype(np.int64) - begins
        chosen = mixed(stretch.astype(np.uint64) ^ self._key) % lengths.astype(np.uint64)
        found: Indices = begins + chosen.astype(np.int64)
        return found
