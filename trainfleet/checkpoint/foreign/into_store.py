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
from trainfleet.checkpoint.tree import Json, encode, join
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
    """Commit them as the state `state` of the checkpoint of `step`; else as `import_states`."""
    tree, placed = state_tree(arrays, state), [(join(state, array.name), array) for array in arrays]
    _commit(store, _staged(tree, placed, tell), step, metadata or {}, replace)


def import_states(
    store: Store,
    states: Mapping[str, Any],
    *,
    step: int = 0,
    metadata: Mapping[str, Any] | None = None,
    replace: bool = False,
    tell: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Commit states, in which ForeignArrays stand for arrays. `tell` hears how many bytes each piece had.

    CheckpointError if there is one of that step, unless `replace`; StoreError if the store is in use by a run.
    Whatever fails, what stood there stands.
    """
    placed: list[tuple[str, ForeignArray]] = []
    tree = {name: _tree(state, name, placed) for name, state in states.items()}
    _commit(store, _staged(tree, placed, tell), step, metadata or {}, replace)


def _commit(store: Store, staged: StagedShard, step: int, metadata: Mapping[str, Any], replace: bool) -> None:
    attempt = Attempt(step=step, run=secrets.token_hex(6), number=1, world_size=1)
    with closing(store.hold()):
        if MANIFEST in steps_and_files(store.names()).get(step, ()) and not replace:
            raise CheckpointError(
                f"{folder_of(step)} exists already in {store!r}.", hint="Name another --step, or replace it: --force."
            )
        order = Order(
            attempt=attempt,
            rank=0,
            staged=staged,
            metadata=encode(dict(metadata), "metadata", lambda array: None),
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


def _tree(value: Any, path: str, placed: list[tuple[str, ForeignArray]]) -> Json:
    """A state in the form of checkpoint/tree.py; its arrays and their paths go into `placed`."""
    if isinstance(value, ForeignArray):
        placed.append((path, value))
        shape = list(value.shape)
        return {"$": "array", "dtype": value.dtype, "shape": shape, "library": "torch", "sharded": False}
    if isinstance(value, Mapping):  # not plain JSON, as a name may begin with $
        items = [[key, _tree(item, join(path, key), placed)] for key, item in value.items()]
        return {"$": "dict", "items": items}
    return encode(value, path, lambda array: None)


def _staged(tree: Json, placed: list[tuple[str, ForeignArray]], tell: Callable[[int], None]) -> StagedShard:
    pieces = []
    for path, array in placed:
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
    return StagedShard(state=tree, pieces=tuple(pieces), left_to_rank_0=())
