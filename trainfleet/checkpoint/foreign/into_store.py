"""Arrays of others into a store, as a checkpoint like any other; memory is that of one piece."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, cast

from trainfleet.checkpoint.arrays import Bytes, num_bytes
from trainfleet.checkpoint.foreign.pieces import ForeignArray, ForeignPiece, state_tree
from trainfleet.checkpoint.names import MANIFEST, Attempt, folder_of, steps_and_files
from trainfleet.checkpoint.order import Order, carry_out
from trainfleet.checkpoint.retention import Retention
from trainfleet.checkpoint.staging import StagedPiece, StagedShard
from trainfleet.checkpoint.tree import encode, join
from trainfleet.comm.group import DEADLINE
from trainfleet.errors import CheckpointError
from trainfleet.store import Store

_ALL = Retention(last=1 << 31)  # what stands there already is none of the importer's


def import_arrays(
    store: Store,
    arrays: tuple[ForeignArray, ...],
    *,
    step: int = 0,
    state: str = "model",
    metadata: Mapping[str, Any] | None = None,
    replace: bool = False,
    tell: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Commit them as the state `state` of the checkpoint of `step`. `tell` hears how many bytes each piece had.

    CheckpointError if there is one of that step, unless `replace`; StoreError if the store is in use by a run.
    Whatever fails, what stood there stands.
    """
    attempt = Attempt(step=step, run=secrets.token_hex(6), number=1, world_size=1)
    with closing(store.hold()):
        if MANIFEST in steps_and_files(store.names()).get(step, ()) and not replace:
            raise CheckpointError(
                f"{folder_of(step)} exists already in {store!r}.", hint="Name another --step, or replace it: --force."
            )
        order = Order(
            attempt=attempt,
            rank=0,
            staged=_staged(arrays, state, tell),
            metadata=encode(dict(metadata or {}), "metadata", lambda array: None),
            metrics={},
            retention=_ALL,
            timeout=DEADLINE,
        )
        carry_out(store, order)


class _Unread:
    """The bytes of a piece, read whenever they are asked for: the shard's writer asks once, for one after another."""

    def __init__(self, piece: ForeignPiece, name: str, size: int, tell: Callable[[int], None]) -> None:
        self._piece, self._name, self._tell = piece, name, tell
        self.size = size

    @property
    def data(self) -> memoryview:
        found = self._piece.read()
        if found.size != self.size:
            raise CheckpointError(f"{self._name} has {found.size} bytes where {self.size} were announced.")
        self._tell(self.size)
        return found.data


def _staged(arrays: tuple[ForeignArray, ...], state: str, tell: Callable[[int], None]) -> StagedShard:
    pieces = []
    for array in arrays:
        path = join(state, array.name)
        for piece in array.pieces:
            late = _Unread(piece, array.name, num_bytes(array.dtype, piece.region.shape), tell)
            pieces.append(
                StagedPiece(
                    path=path,
                    dtype=array.dtype,
                    region=piece.region,
                    data=cast(Bytes, late),
                    start=0,  # in no staging memory
                    per_rank=False,
                )
            )
    return StagedShard(state=state_tree(arrays, state), pieces=tuple(pieces), left_to_rank_0=())
