"""The order of an epoch as a function: which sample stands at which position.

A shuffled order is a keyed permutation that is computed, never stored. The positions 0..n-1 are laid
on a grid of `rows` x `columns`, just large enough; each round adds to one coordinate a keyed hash of the
other (a Feistel network on unequal halves), which can always be undone, so no two positions meet. The
few that land on a cell past n are sent through again until they come back below n (cycle walking).

Where samples lie together in blocks that are fetched whole (shards), such an order would want all of them at
all times. Their order permutes the blocks, and then the samples of a few blocks that follow each other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainfleet.errors import DataError

Indices: TypeAlias = NDArray[np.int64]

MAX_SAMPLES = 1 << 48
ROUNDS = 8  # pairs; with 6 the orders of 5 samples are visibly uneven (chi-square, tests/data/test_order.py)
U64 = np.uint64


@dataclass(frozen=True)
class Blocks:
    """Stretches of samples that lie together, and an order that stays within `window` of them at a time.

    The blocks of an epoch are permuted and cut into windows of that many; the samples of a window are permuted among
    themselves. Windows as large as the whole are the order without blocks.
    """

    sizes: tuple[int, ...]
    """Samples of each block, in the order of the source."""
    window: int
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.window < 1 or min(self.sizes, default=0) < 1:
            smallest = min(self.sizes, default=0)
            raise DataError(
                f"A window of {self.window} blocks of {smallest} samples or more has no order; use 1 of each."
            )
        object.__setattr__(self, "_hash", hash((self.sizes, self.window)))

    def __hash__(self) -> int:  # of a hundred thousand sizes, asked for with each batch
        return self._hash

    @property
    def whole(self) -> bool:
        """Whether one window holds all blocks."""
        return self.window >= len(self.sizes)

    def coming(
        self, position: int, *, seed: int = 0, epoch: int = 0, shuffle: bool = True
    ) -> tuple[list[int], list[int]]:
        """The blocks that the samples at a position are taken from, and those to have ready by then, in their order.

        Of the next window there are as many as of this one are used up, and one more.
        """
        if not shuffle:
            block = int(np.searchsorted(_ends(self), position, side="right"))
            return [block], [(block + 1) % len(self.sizes)]
        if self.whole:
            return _all_blocks(len(self.sizes)), []
        order, ends = _permuted_blocks(self, seed, epoch)
        first = int(np.searchsorted(ends, position, side="right")) // self.window * self.window
        last = min(first + self.window, len(order))
        begin, end = int(ends[first - 1]) if first else 0, int(ends[last - 1])
        ahead = 1 + (position - begin) * self.window // (end - begin)
        following = order[last : last + ahead] if last < len(order) else _permuted_blocks(self, seed, epoch + 1)[0]
        return order[first:last].tolist(), following[:ahead].tolist()


def indices_at(
    positions: Any,
    *,
    num_samples: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    blocks: Blocks | None = None,
) -> Indices:
    """The sample at each position of an epoch: a pure function, the same on every rank and worker.

    O(len(positions)) time and memory, whatever `num_samples`; with `blocks`, O(blocks) more once an epoch.
    """
    wanted = np.asarray(positions, np.int64)
    if not 0 < num_samples <= MAX_SAMPLES:
        raise DataError(f"A dataset of {num_samples} samples has no order; between 1 and 2^48 samples can be ordered.")
    if wanted.size and (wanted.min() < 0 or wanted.max() >= num_samples):
        raise IndexError(f"Positions {wanted.min()} to {wanted.max()} do not lie in an epoch of {num_samples} samples.")
    if not shuffle:
        return wanted
    if blocks is not None and _ends(blocks)[-1] != num_samples:
        raise DataError(f"The blocks of a dataset of {num_samples} samples hold {_ends(blocks)[-1]} of them.")
    if blocks is None or blocks.whole:
        return _permute(wanted, num_samples, _round_keys(seed, epoch))
    return _in_blocks(wanted, blocks, seed, epoch)


def epoch_order(
    *, num_samples: int, seed: int = 0, epoch: int = 0, shuffle: bool = True, blocks: Blocks | None = None
) -> Iterator[int]:
    """All samples of an epoch in their order, a stretch at a time."""
    for begin in range(0, num_samples, 8192):
        stretch = np.arange(begin, min(begin + 8192, num_samples))
        yield from indices_at(
            stretch, num_samples=num_samples, seed=seed, epoch=epoch, shuffle=shuffle, blocks=blocks
        ).tolist()


def _in_blocks(positions: Indices, blocks: Blocks, seed: int, epoch: int) -> Indices:
    order, ends = _permuted_blocks(blocks, seed, epoch)
    window_ends = np.append(ends[blocks.window - 1 : -1 : blocks.window], ends[-1])
    windows = np.searchsorted(window_ends, positions, side="right")
    # Places count the samples block by block, in the order of the blocks.
    places = np.empty_like(positions)
    for window in np.unique(windows).tolist():
        begin, end = int(window_ends[window - 1]) if window else 0, int(window_ends[window])
        inside = windows == window
        keys = _round_keys(seed, epoch, f" window {window}")
        places[inside] = begin + _permute(positions[inside] - begin, end - begin, keys)
    nth = np.searchsorted(ends, places, side="right")
    found: Indices = _ends(blocks)[order[nth]] - (ends[nth] - places)
    return found


@lru_cache(maxsize=8)
def _all_blocks(count: int) -> list[int]:
    return list(range(count))


@lru_cache(maxsize=8)
def _ends(blocks: Blocks) -> Indices:
    """Of each block, the samples up to and with it."""
    ends: Indices = np.cumsum(np.array(blocks.sizes, np.int64))
    return ends


@lru_cache(maxsize=8)
def _permuted_blocks(blocks: Blocks, seed: int, epoch: int) -> tuple[Indices, Indices]:
    """(the blocks in the order of an epoch, the samples up to and with each of them)."""
    count = len(blocks.sizes)
    order = _permute(np.arange(count), count, _round_keys(seed, epoch, " blocks"))
    return order, np.cumsum(np.array(blocks.sizes, np.int64)[order])


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int, part: str = "") -> tuple[np.uint64, ...]:
    digest = hashlib.shake_128(f"trainfleet order {seed} {epoch}{part}".encode()).digest(16 * ROUNDS)
    return tuple(np.frombuffer(digest, "<u8").astype(U64))


def _permute(positions: Indices, n: int, keys: tuple[np.uint64, ...]) -> Indices:
    columns = math.isqrt(n - 1) + 1  # the rounded up square root, so that rows * columns >= n, and barely
    rows = -(-n // columns)
    cells = positions.astype(U64)
    outside = np.ones(cells.shape, bool)
    while outside.any():  # each cell is on a cycle through the positions below n: this ends
        cells[outside] = _rounds(cells[outside], U64(rows), U64(columns), keys)
        outside = cells >= U64(n)
    return cells.astype(np.int64)


def _rounds(cells: NDArray[np.uint64], rows: np.uint64, columns: np.uint64, keys: tuple[np.uint64, ...]) -> Any:
    row, column = np.divmod(cells, columns)
    for k in range(0, len(keys), 2):
        row = (row + mixed(column ^ keys[k]) % rows) % rows
        column = (column + mixed(row ^ keys[k + 1]) % columns) % columns
    return row * columns + column


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the input moves every bit of the output: the finaliser of SplitMix64."""
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))
