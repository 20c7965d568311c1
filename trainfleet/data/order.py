"""The order of an epoch as a function: which sample stands at which position.

A shuffled order is a keyed permutation that is computed, never stored. The positions 0..n-1 are laid
on a grid of `rows` x `columns`, just large enough; each round adds to one coordinate a keyed hash of the
other (a Feistel network on unequal halves), which can always be undone, so no two positions meet. The
few that land on a cell past n are sent through again until they come back below n (cycle walking).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainfleet.errors import DataError

Indices: TypeAlias = NDArray[np.int64]

MAX_SAMPLES = 1 << 48
ROUNDS = 8  # pairs; with 6 the orders of 5 samples are visibly uneven (chi-square, tests/data/test_order.py)
U64 = np.uint64


def indices_at(positions: Any, *, num_samples: int, seed: int = 0, epoch: int = 0, shuffle: bool = True) -> Indices:
    """The sample at each position of an epoch: a pure function, the same on every rank and worker.

    O(len(positions)) time and memory, whatever `num_samples`.
    """
    wanted = np.asarray(positions, np.int64)
    if not 0 < num_samples <= MAX_SAMPLES:
        raise DataError(f"A dataset of {num_samples} samples has no order; between 1 and 2^48 samples can be ordered.")
    if wanted.size and (wanted.min() < 0 or wanted.max() >= num_samples):
        raise IndexError(f"Positions {wanted.min()} to {wanted.max()} do not lie in an epoch of {num_samples} samples.")
    return _permute(wanted, num_samples, _round_keys(seed, epoch)) if shuffle else wanted


def epoch_order(*, num_samples: int, seed: int = 0, epoch: int = 0, shuffle: bool = True) -> Iterator[int]:
    """All samples of an epoch in their order, a block at a time."""
    for begin in range(0, num_samples, 8192):
        block = np.arange(begin, min(begin + 8192, num_samples))
        yield from indices_at(block, num_samples=num_samples, seed=seed, epoch=epoch, shuffle=shuffle).tolist()


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    digest = hashlib.shake_128(f"trainfleet order {seed} {epoch}".encode()).digest(16 * ROUNDS)
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
        row = (row + _hash(column ^ keys[k]) % rows) % rows
        column = (column + _hash(row ^ keys[k + 1]) % columns) % columns
    return row * columns + column


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the input moves every bit of the output: the finaliser of SplitMix64."""
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))
