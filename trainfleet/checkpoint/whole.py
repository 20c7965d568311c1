"""A checkpoint seen as one process would have saved it: whole arrays, joined from the pieces one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainfleet.checkpoint.arrays import Bytes, as_words, make, num_bytes
from trainfleet.checkpoint.regions import Region, first_overlap, tiles
from trainfleet.checkpoint.sealed import Damaged
from trainfleet.checkpoint.shard import DataFile, Index, StoredPiece
from trainfleet.checkpoint.tree import StoredArray, decode, merged, stored_arrays
from trainfleet.state import PerRank
from trainfleet.store import Store


@dataclass(frozen=True, slots=True)
class _Held:
    """A piece, and whose data file it is in."""

    rank: int
    piece: StoredPiece


class Whole:
    """The states of a checkpoint and its arrays. What is read is verified; memory is that of one array.

    with Whole(store, indexes) as whole:
        for array in whole.arrays("model"):
            data = whole.read(array)
    """

    def __init__(
        self, store: Store, indexes: list[Index], tell: Callable[[int], None] = lambda num_bytes: None
    ) -> None:
        """`tell` hears of the bytes as they are read."""
        self._tell = tell
        self._store = store
        self._indexes = indexes
        self._open = ExitStack()
        self._files: dict[int, DataFile] = {}
        self._pieces: dict[str, list[_Held]] = {}
        self._own: dict[tuple[str, int], _Held] = {}
        self.states: dict[str, Any] = {}
        """By the names of the Statefuls, decoded, with StoredArray for arrays; a PerRank holds rank 0's value."""
        for index in indexes:
            self.states = merged(self.states, {name: decode(state, name) for name, state in index.state.items()})
            for piece in index.pieces:
                held = _Held(index.rank, piece)
                if piece.per_rank:
                    self._own[piece.path, index.rank] = held
                else:
                    self._pieces.setdefault(piece.path, []).append(held)

    @property
    def num_ranks(self) -> int:
        """How many saved it."""
        return len(self._indexes)

    def states_of(self, rank: int) -> dict[str, Any]:
        """As that rank gave them: a PerRank holds its own value."""
        return {name: decode(state, name) for name, state in self._indexes[rank].state.items()}

    def arrays(self, state: str | None = None) -> Iterator[StoredArray]:
        """The arrays of one state, or of all, without those that are each rank's own."""
        for name, value in self.states.items():
            if state in (None, name):
                yield from (array for array, per_rank in stored_arrays(value) if not per_rank)

    def read(self, array: StoredArray, *, rank: int | None = None) -> Bytes:
        """The bytes of the whole array; with `rank`, of the one that is that rank's own. Damaged if one is wrong."""
        region = Region((0,) * len(array.shape), array.shape)
        if rank is None:
            held = self._pieces.get(array.path, [])
        else:
            held = [self._own[array.path, rank]] if (array.path, rank) in self._own else []
        self._check(array, region, [each.piece for each in held])
        data = np.empty(num_bytes(array.dtype, array.shape), np.uint8)
        for each in held:
            self._read_into(each, array, region, data)
            self._tell(each.piece.end - each.piece.begin)
        return data

    @staticmethod
    def _check(array: StoredArray, whole: Region, pieces: list[StoredPiece]) -> None:
        """Damaged unless the pieces are those of the array, before memory is taken for it."""
        for piece in pieces:
            if piece.dtype != array.dtype or len(piece.region.shape) != len(whole.shape):
                raise Damaged(f"{array.path}: a piece of it is {piece.dtype} {piece.region.shape}")
            if not all(at + n <= most for at, n, most in zip(piece.region.offsets, piece.region.shape, whole.shape)):
                raise Damaged(f"{array.path}: a piece of it, at {piece.region.offsets}, does not lie within it")
        regions = [piece.region for piece in pieces]
        if not tiles(regions, whole.shape) or first_overlap(regions) is not None:
            raise Damaged(f"{array.path}: not all of it is stored")

    def read_own(self, array: StoredArray) -> Bytes:
        """The same; of an array that each rank has of its own, that of rank 0."""
        return self.read(array, rank=None if array.path in self._pieces or (array.path, 0) not in self._own else 0)

    def _read_into(self, held: _Held, array: StoredArray, whole: Region, data: Bytes) -> None:
        piece = held.piece
        file = self._file(held.rank)
        if piece.region.shape[1:] == whole.shape[1:]:  # rows, which lie together in the whole
            row = num_bytes(array.dtype, whole.shape[1:])
            start = piece.region.offsets[0] * row if whole.shape else 0
            file.read(piece, data[start : start + piece.end - piece.begin])
            return
        part = np.empty(piece.end - piece.begin, np.uint8)
        file.read(piece, part)
        cut = as_words(part, piece.dtype, piece.region.shape)
        as_words(data, array.dtype, whole.shape)[piece.region.slices_in(whole)] = cut

    def _file(self, rank: int) -> DataFile:
        if rank not in self._files:
            self._files[rank] = self._open.enter_context(DataFile(self._store, self._indexes[rank]))
        return self._files[rank]

    def __enter__(self) -> Whole:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def whole_states(store: Store, indexes: list[Index]) -> dict[str, Any]:
    """All states in memory, with arrays of the library they came from, on the CPU; of what is per rank, rank 0's."""
    with Whole(store, indexes) as whole:

        def rejoined(value: Any, rank: int | None = None) -> Any:
            if isinstance(value, StoredArray):
                return make(value.library, value.dtype, value.shape, whole.read(value, rank=rank))
            if isinstance(value, PerRank):
                return rejoined(value.value, 0)
            if isinstance(value, dict):
                return {key: rejoined(item, rank) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(rejoined(item, rank) for item in value)
            return value

        return {name: rejoined(state) for name, state in whole.states.items()}
