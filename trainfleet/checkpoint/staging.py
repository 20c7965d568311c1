"""The first of three acts of a save: copy what this rank must store, so that training may go on.

stage    copy arrays into memory kept for it           in the loop          (here)
write    store and hash the copies                     behind the loop      shard.py (order.py, writer.py)
publish  wait for all ranks, then store the manifest   behind, on rank 0    manifest.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainfleet.checkpoint.arrays import Bytes, copy_bytes, num_bytes, shape_of
from trainfleet.checkpoint.memory import StagingMemory
from trainfleet.checkpoint.regions import Region
from trainfleet.checkpoint.tree import Json, TakenArray, encode
from trainfleet.errors import CheckpointError
from trainfleet.state import ShardedArray, Stateful

_ALIGNMENT = 64


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

    @property
    def num_bytes(self) -> int:
        return sum(int(piece.data.size) for piece in self.pieces)


def stage(statefuls: Mapping[str, Stateful], memory: StagingMemory, *, rank: int) -> StagedShard:
    """Take the states and copy this rank's part of them into `memory`."""
    state, taken = _take(statefuls)
    left = [array.path for array in taken if rank and not array.per_rank and not isinstance(array.array, ShardedArray)]
    pieces = _copy([array for array in taken if _stored_by(array, rank)], memory)
    return StagedShard(state=state, pieces=pieces, left_to_rank_0=tuple(left))


def reserve(statefuls: Mapping[str, Stateful], memory: StagingMemory, *, rank: int) -> None:
    """Get the memory that `stage` will need."""
    _, taken = _take(statefuls)
    memory.reserve(_starts([array for array in taken if _stored_by(array, rank)])[-1])


def _take(statefuls: Mapping[str, Stateful]) -> tuple[dict[str, Json], list[TakenArray]]:
    """The states, encoded, and the arrays in them."""
    taken: dict[str, TakenArray] = {}

    def take(array: TakenArray) -> None:
        if array.path in taken:
            raise CheckpointError(f"Two arrays are called {array.path}: keys such as 1 and '1' look alike.")
        taken[array.path] = array

    state = {name: encode(state_of(name, stateful), name, take) for name, stateful in statefuls.items()}
    return state, list(taken.values())


def _starts(kept: list[TakenArray]) -> list[int]:
    """Where each array begins in the staging memory, and where the last one ends."""
    starts = [0]
    for array in kept:
        size = num_bytes(array.dtype, shape_of(_local(array)))
        starts.append(-(-(starts[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
    return starts


def _copy(kept: list[TakenArray], memory: StagingMemory) -> tuple[StagedPiece, ...]:
    starts = _starts(kept)
    reserved = memory.reserve(starts[-1])
    pieces = []
    for array, start in zip(kept, starts):
        local = _local(array)
        shape = shape_of(local)
        size = num_bytes(array.dtype, shape)
        if size == 0:
            continue
        data = reserved[start : start + size]
        copy_bytes(local, array.dtype, data)
        offsets = array.array.offsets if isinstance(array.array, ShardedArray) else (0,) * len(shape)
        region = Region(tuple(offsets), shape)
        pieces.append(
            StagedPiece(
                path=array.path, dtype=array.dtype, region=region, data=data, start=start, per_rank=array.per_rank
            )
        )
    return tuple(pieces)


def state_of(name: str, stateful: Stateful) -> dict[str, Any]:
    """The state of one Stateful; CheckpointError for what is none."""
    if not isinstance(stateful, Stateful):
        raise CheckpointError(
            f"{name} is a {type(stateful).__name__} and has no state_dict and load_state_dict; "
            "give an object that has both."
        )
    return dict(stateful.state_dict())


def _local(array: TakenArray) -> Any:
    return array.array.local if isinstance(array.array, ShardedArray) else array.array


def _stored_by(array: TakenArray, rank: int) -> bool:
    if array.per_rank:
        return True
    if isinstance(array.array, ShardedArray):
        return array.array.replica == 0
    return rank == 0
