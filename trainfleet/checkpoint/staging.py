"""The first of three acts of a save: copy what this rank must store, so that training may go on.

stage    copy arrays into memory kept for it           in the loop          (here)
write    store and hash the copies                     behind the loop      shard.py (order.py, writer.py)
publish  wait for all ranks, then store the manifest   behind, on rank 0    manifest.py
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainfleet.checkpoint.arrays import Bytes, copy_bytes, num_bytes
from trainfleet.checkpoint.memory import Layout, StagingMemory
from trainfleet.checkpoint.regions import Region
from trainfleet.checkpoint.tree import Json, TakenArray, encode
from trainfleet.errors import CheckpointError
from trainfleet.state import ShardedArray, Stateful

_ALIGNMENT = 64
_NUMBERS = itertools.count(1)


class Place(NamedTuple):
    """What an array is and where it belongs; the same at each save, unless a state changes its structure."""

    path: str
    dtype: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    per_rank: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedPiece:
    path: str
    dtype: str
    region: Region
    data: Bytes
    """In the staging memory."""
    start: int
    """Its first byte there."""
    per_rank: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedShard:
    """All that one rank stores of one step. Its bytes lie in the staging memory until that is used again."""

    state: Json
    """The states of all Statefuls, encoded."""
    pieces: tuple[StagedPiece, ...]
    left_to_rank_0: tuple[str, ...]
    """Paths of arrays that are whole here, and not stored because rank 0 stores them."""
    layout: int = 0
    """Shards of one number have the same pieces, but for their bytes."""

    @property
    def num_bytes(self) -> int:
        return sum(int(piece.data.size) for piece in self.pieces)


def stage(statefuls: Mapping[str, Stateful], memory: StagingMemory, *, rank: int) -> StagedShard:
    """Take the states and copy this rank's part of them into `memory`."""
    state, taken = _take(statefuls)
    left = [array.path for array in taken if rank and not array.per_rank and not isinstance(array.array, ShardedArray)]
    held, places = _stored_by(rank, taken)
    reserved = memory.reserve(_size_of(places))
    layout = _laid_out(tuple(places), memory, reserved)
    begin = reserved.ctypes.data
    for local, piece in zip(held, layout.pieces, strict=True):
        copy_bytes(local, piece.dtype, piece.data, begin + piece.start)
    return StagedShard(state=state, pieces=layout.pieces, left_to_rank_0=tuple(left), layout=layout.number)


def reserve(statefuls: Mapping[str, Stateful], memory: StagingMemory, *, rank: int) -> None:
    """Get the memory that `stage` will need."""
    _, taken = _take(statefuls)
    memory.reserve(_size_of(_stored_by(rank, taken)[1]))


def _take(statefuls: Mapping[str, Stateful]) -> tuple[dict[str, Json], list[TakenArray]]:
    """The states, encoded, and the arrays in them."""
    taken: dict[str, TakenArray] = {}

    def take(array: TakenArray) -> None:
        if array.path in taken:
            raise CheckpointError(f"Two arrays are called {array.path}: keys such as 1 and '1' look alike.")
        taken[array.path] = array

    state = {name: encode(state_of(name, stateful), name, take) for name, stateful in statefuls.items()}
    return state, list(taken.values())


def _stored_by(rank: int, taken: list[TakenArray]) -> tuple[list[Any], list[Place]]:
    """What this rank stores: the arrays that lie here, and the place of each. Empty ones are left out."""
    held: list[Any] = []
    places: list[Place] = []
    for each in taken:
        array = each.array
        if isinstance(array, ShardedArray):
            local, offsets, is_stored = array.local, array.offsets, array.replica == 0
        else:
            local, offsets, is_stored = array, None, each.per_rank or rank == 0
        shape = tuple(local.shape)
        if is_stored and 0 not in shape:
            held.append(local)
            places.append(Place(each.path, each.dtype, offsets or (0,) * len(shape), shape, each.per_rank))
    return held, places


def _size_of(places: list[Place]) -> int:
    """Bytes of all of them in the staging memory, each aligned."""
    return sum(_aligned(num_bytes(place.dtype, place.shape)) for place in places)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _laid_out(places: tuple[Place, ...], memory: StagingMemory, reserved: Bytes) -> Layout:
    """The pieces at these places; those of the last save where nothing has changed."""
    if memory.layout is not None and memory.layout.places == places:
        return memory.layout
    pieces = []
    start = 0
    for place in places:
        size = num_bytes(place.dtype, place.shape)
        region = Region(tuple(map(int, place.offsets)), tuple(map(int, place.shape)))
        data = reserved[start : start + size]
        pieces.append(
            StagedPiece(
                path=place.path, dtype=place.dtype, region=region, data=data, start=start, per_rank=place.per_rank
            )
        )
        start += _aligned(size)
    memory.layout = Layout(next(_NUMBERS), places, tuple(pieces))
    return memory.layout


def state_of(name: str, stateful: Stateful) -> dict[str, Any]:
    """The state of one Stateful; CheckpointError for what is none."""
    if not isinstance(stateful, Stateful):
        raise CheckpointError(
            f"{name} is a {type(stateful).__name__} and has no state_dict and load_state_dict; "
            "give an object that has both."
        )
    return dict(stateful.state_dict())
