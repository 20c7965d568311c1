"""Reading a checkpoint into live state, at any world size and any cut of the arrays.

    plan    walk the live states (the template) beside the stored ones: what fits where, what does not fit
    read    fetch and verify the pieces that overlap, into memory of our own
    apply   fill the template's arrays and hand each state to its owner

Until all ranks have read without a complaint nothing live is touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from trainfleet.checkpoint.arrays import Bytes, as_words, dtype_of, fill, is_array, make, num_bytes, shape_of
from trainfleet.checkpoint.floats import FLOATS, recast
from trainfleet.checkpoint.regions import Region, first_overlap, tiles
from trainfleet.checkpoint.sealed import Damaged
from trainfleet.checkpoint.shard import DataFile, Index, StoredPiece
from trainfleet.checkpoint.tree import StoredArray, decode, join, merged, stored_arrays
from trainfleet.errors import CheckpointError, StoreError
from trainfleet.state import PerRank, Setting, ShardedArray, Stateful
from trainfleet.store import Store

Finish: TypeAlias = Callable[[], Any]
"""Gives a value of the state once all bytes are read."""
Tell: TypeAlias = Callable[[int], None]
"""Hears of bytes that were read."""

_ABSENT: Any = object()


@dataclass(slots=True)
class Target:
    """A region of an array that this rank wants, and the memory it is read into."""

    dtype: str
    region: Region
    data: Bytes
    filled: list[Region] = field(default_factory=list)
    """What was read so far."""

    def take(self, piece: StoredPiece, data: Bytes) -> None:
        common = self.region.overlap(piece.region)
        if common is not None:
            words = as_words(self.data, self.dtype, self.region.shape)
            source = as_words(data, piece.dtype, piece.region.shape)
            words[common.slices_in(self.region)] = source[common.slices_in(piece.region)]
            self.filled.append(common)

    @property
    def is_whole(self) -> bool:
        return tiles(self.filled, self.region.shape) and first_overlap(self.filled) is None


@dataclass(slots=True)
class Misfits:
    """Where the live state and the stored one are unlike."""

    wrong: list[str] = field(default_factory=list)
    """Sentences: missing, or of another shape, dtype or kind."""
    surplus: list[str] = field(default_factory=list)
    """Paths stored that this rank's state has no place for; another rank's may have."""
    kept: list[str] = field(default_factory=list)
    """Paths of per-rank values that were not stored for this rank and stay as they are."""


class Loading:
    """One checkpoint on its way into the states of this rank."""

    def __init__(self, indexes: list[Index], rank: int) -> None:
        self._indexes = indexes
        self._rank = rank
        self._cast = False
        self._num_stored_bytes = sum(piece.end - piece.begin for index in indexes for piece in index.pieces)
        self._targets: dict[tuple[str, bool], list[Target]] = {}  # by path, and whether it is the rank's own
        self._finish: dict[str, Finish] = {}
        self.misfits = Misfits()

    # plan

    def plan(self, templates: Mapping[str, Mapping[str, Any]], *, partial: bool, cast: bool = False) -> None:
        """Find a place for everything; what has none is in `misfits`. `cast` lets floats be of another dtype."""
        self._cast = cast
        stored: dict[str, Any] = {}
        for index in self._indexes:
            stored = merged(stored, {name: decode(state, name) for name, state in index.state.items()})
        own: dict[str, Any] = {}
        if self._rank < len(self._indexes):
            own = {name: decode(state, name) for name, state in self._indexes[self._rank].state.items()}
        for name, template in templates.items():
            if name not in stored:
                self.misfits.wrong.append(f"{name} is missing from the checkpoint, which holds {', '.join(stored)}")
            else:
                self._finish[name] = self._plan(template, stored[name], own.get(name, _ABSENT), name, top=True)
        if not partial:
            self.misfits.surplus += [name for name in stored if name not in templates]

    def _plan(self, template: Any, stored: Any, own: Any, path: str, *, top: bool = False) -> Finish:
        if isinstance(template, PerRank) or isinstance(stored, PerRank):
            return self._plan_per_rank(template, stored, own, path)
        if isinstance(template, Setting):
            return self._plan_setting(template, stored, path)
        if isinstance(template, ShardedArray) or is_array(template):
            return self._plan_array(template, stored, path, per_rank=False)
        if isinstance(template, Mapping) and template and isinstance(stored, Mapping):
            return self._plan_mapping(template, stored, own, path, top=top)
        if isinstance(template, list | tuple) and isinstance(stored, list | tuple) and _has_arrays(template):
            parts = self._plan_mapping(
                dict(enumerate(template)), dict(enumerate(stored)), _numbered(own), path, top=False
            )
            kind = type(stored)
            return lambda: kind(parts().values())
        if _has_arrays(template) or (_has_arrays(stored) and template not in (None, {}, [], ())):
            self.misfits.wrong.append(f"{path} is {_kind(stored)} in the checkpoint and here {_kind(template)}")
            return lambda: template
        return self._plan_anew(stored, own, path, per_rank=False)

    def _plan_per_rank(self, template: Any, stored: Any, own: Any, path: str) -> Finish:
        """This rank's own value, else what it has; a value stored for all ranks is taken by each."""
        inner = template.value if isinstance(template, PerRank) else template
        if isinstance(own, PerRank):
            finish = self._plan_own(inner, own.value, path)
        elif isinstance(stored, PerRank):
            self.misfits.kept.append(path)
            return lambda: template
        else:
            finish = self._plan(inner, stored, _ABSENT, path)
        return (lambda: PerRank(finish())) if isinstance(template, PerRank) else finish

    def _plan_own(self, template: Any, own: Any, path: str) -> Finish:
        if is_array(template):
            return self._plan_array(template, own, path, per_rank=True)
        if isinstance(template, Mapping) and isinstance(own, Mapping) and template.keys() == own.keys():
            parts = {key: self._plan_own(template[key], own[key], join(path, key)) for key in own}
            return lambda: {key: finish() for key, finish in parts.items()}
        return self._plan_anew(own, own, path, per_rank=True)

    def _plan_mapping(
        self, template: Mapping[Any, Any], stored: Mapping[Any, Any], own: Any, path: str, *, top: bool
    ) -> Callable[[], dict[Any, Any]]:
        parts: dict[Any, Finish] = {}
        for key, value in template.items():
            below = join(path, key)
            if key in stored:
                parts[key] = self._plan(value, stored[key], _at(own, key), below)
            elif top or _has_arrays(value):
                self.misfits.wrong.append(f"{below} is missing from the checkpoint")
        for key, value in stored.items():
            if key not in template:
                below = join(path, key)
                arrays = [array.path for array, _ in stored_arrays(value)]
                self.misfits.surplus += arrays or [below] * top
                if not arrays and not top:
                    parts[key] = self._plan_anew(value, _at(own, key), below, per_rank=False)
        return lambda: _finished(parts)

    def _plan_setting(self, template: Setting, stored: Any, path: str) -> Finish:
        there = stored.value if isinstance(stored, Setting) else stored
        if there != template.value and not self._cast:
            self.misfits.wrong.append(
                f"{path} is {there!r} in the checkpoint and {template.value!r} here; to go on all the same, allow it "
                "with cast=True (checkpoint.cast=true in a recipe)"
            )
        return lambda: template

    def _plan_array(self, template: Any, stored: Any, path: str, *, per_rank: bool) -> Finish:
        local = template.local if isinstance(template, ShardedArray) else template
        if not isinstance(stored, StoredArray):
            self.misfits.wrong.append(f"{path} is {_kind(stored)} in the checkpoint and here an array")
            return lambda: template
        shape = template.global_shape if isinstance(template, ShardedArray) else shape_of(template)
        offsets = template.offsets if isinstance(template, ShardedArray) else (0,) * len(shape)
        dtype = dtype_of(local, path)
        fits = True
        if stored.shape != tuple(shape):
            self.misfits.wrong.append(f"{path} has shape {stored.shape} in the checkpoint and {tuple(shape)} here")
            fits = False
        both_float = stored.dtype in FLOATS and dtype in FLOATS
        if stored.dtype != dtype and not (self._cast and both_float):
            remedy = "; to have it rounded, allow it with cast=True (checkpoint.cast=true in a recipe)" * both_float
            self.misfits.wrong.append(f"{path} has dtype {stored.dtype} in the checkpoint and {dtype} here{remedy}")
            fits = False
        if not fits:
            return lambda: template
        target = self._want(path, stored.dtype, Region(tuple(offsets), shape_of(local)), per_rank)

        def filled() -> Any:
            return fill(local, recast(target.data, stored.dtype, dtype))

        if isinstance(template, ShardedArray):
            return lambda: dataclasses.replace(template, local=filled())
        return filled

    def _plan_anew(self, stored: Any, own: Any, path: str, *, per_rank: bool) -> Finish:
        """A value for which the template has nothing yet: as it was stored, with new arrays."""
        if isinstance(stored, StoredArray):
            if stored.sharded:
                self.misfits.wrong.append(
                    f"{path} is cut into pieces, and the state here does not say which piece it wants; "
                    "let it make its arrays before restoring"
                )
                return lambda: None
            if num_bytes(stored.dtype, stored.shape) > self._num_stored_bytes:  # its shape is the file's word alone
                raise Damaged(f"{path}: not all of it is stored")
            target = self._want(path, stored.dtype, Region((0,) * len(stored.shape), stored.shape), per_rank)
            return lambda: make(stored.library, stored.dtype, stored.shape, target.data)
        if isinstance(stored, PerRank):
            if not isinstance(own, PerRank):
                self.misfits.kept.append(path)
                return lambda: _ABSENT
            mine = self._plan_anew(own.value, own.value, path, per_rank=True)
            return lambda: PerRank(mine())
        if isinstance(stored, dict):
            parts = {
                key: self._plan_anew(item, _at(own, key), join(path, key), per_rank=per_rank)
                for key, item in stored.items()
            }
            return lambda: _finished(parts)
        if isinstance(stored, list | tuple):
            kind = type(stored)
            listed = {
                i: self._plan_anew(item, _at(_numbered(own), i), join(path, i), per_rank=per_rank)
                for i, item in enumerate(stored)
            }
            return lambda: kind(_finished(listed).values())
        return lambda: stored

    def _want(self, path: str, dtype: str, region: Region, per_rank: bool) -> Target:
        size = num_bytes(dtype, region.shape)
        try:
            target = Target(dtype, region, np.empty(size, np.uint8))
        except (MemoryError, ValueError) as error:
            raise CheckpointError(f"There is no memory for the {size} bytes of {path}.") from error
        self._targets.setdefault((path, per_rank), []).append(target)
        return target

    # read

    def read(self, store: Store, *, world_size: int, tell: Tell = lambda num_bytes: None) -> None:
        """Read and verify what is wanted here, and this rank's part of all else; Damaged names all that is bad.

        Of the files of the checkpoint every `world_size`-th is read whole here, wanted or not, so that
        together the ranks have seen every byte. `tell` hears of the bytes as they are read.
        """
        problems: list[str] = []
        for index in self._indexes:
            pieces = [
                piece for piece in index.pieces if index.rank % world_size == self._rank or self._wanted(index, piece)
            ]
            if pieces or index.rank % world_size == self._rank:
                problems += self._read_file(store, index, pieces, tell)
        if not problems:
            for (path, _), targets in self._targets.items():
                problems += [f"{path}: not all of it is stored" for t in targets if not t.is_whole]
        if problems:
            raise Damaged("\n".join(problems))

    def _wanted(self, index: Index, piece: StoredPiece) -> list[Target]:
        if piece.per_rank and index.rank != self._rank:
            return []
        targets = self._targets.get((piece.path, piece.per_rank), [])
        if any((piece.dtype, len(piece.region.shape)) != (t.dtype, len(t.region.shape)) for t in targets):
            raise Damaged(f"{piece.path}: a piece of it is {piece.dtype} {piece.region.shape}")
        return [target for target in targets if target.region.overlap(piece.region) is not None]

    def _read_file(self, store: Store, index: Index, pieces: list[StoredPiece], tell: Tell) -> list[str]:
        problems = []
        try:
            with DataFile(store, index) as file:
                for piece in pieces:
                    try:
                        self._read_piece(file, index, piece)
                        tell(piece.end - piece.begin)
                    except Damaged as error:
                        problems.append(str(error))
        except Damaged as error:
            problems.append(str(error))
        except StoreError as error:
            problems.append(f"{index.data_name}: {error}")
        return problems

    def _read_piece(self, file: DataFile, index: Index, piece: StoredPiece) -> None:
        wanted = self._wanted(index, piece)
        if len(wanted) == 1 and wanted[0].region == piece.region:
            file.read(piece, wanted[0].data)  # the usual case, cut as it was: no second copy
            wanted[0].filled.append(piece.region)
            return
        if not wanted:
            file.check(piece)
            return
        data = np.empty(piece.end - piece.begin, np.uint8)
        file.read(piece, data)
        for target in wanted:
            target.take(piece, data)

    def wants(self, piece: StoredPiece) -> bool:
        """Whether this rank wants some of a piece that is no rank's own."""
        return bool(self._wanted(self._indexes[0], piece))

    def take(self, piece: StoredPiece, data: Bytes) -> None:
        """The bytes of such a piece, from wherever they came."""
        for target in self._wanted(self._indexes[0], piece):
            target.take(piece, data)

    # apply

    def apply(self, statefuls: Mapping[str, Stateful]) -> None:
        for name, finish in self._finish.items():
            statefuls[name].load_state_dict(finish())


def verify_shards(store: Store, indexes: list[Index], tell: Tell = lambda num_bytes: None) -> None:
    """Read everything and compare digests; Damaged names all that is bad."""
    Loading(indexes, rank=0).read(store, world_size=1, tell=tell)


_REMEDY = "Restore into the model and optimizer that were saved; `partial=True` leaves out whole states."


def refuse_misfits(wrong: list[str], surplus: list[str], place: str, *, hint: str = _REMEDY) -> None:
    """CheckpointError if the state of any rank does not fit, naming what and how."""
    said = [*wrong, *(f"{path} is in the checkpoint and not here" for path in surplus)]
    if said:
        shown = "; ".join(said[:10]) + (f"; and {len(said) - 10} more" if len(said) > 10 else "")
        raise CheckpointError(f"{place} does not fit this run: {shown}.", hint=hint)


def _has_arrays(value: Any) -> bool:
    if isinstance(value, ShardedArray | StoredArray) or is_array(value):
        return True
    if isinstance(value, PerRank):
        return _has_arrays(value.value)
    if isinstance(value, Mapping):
        return any(_has_arrays(item) for item in value.values())
    return isinstance(value, list | tuple) and any(_has_arrays(item) for item in value)


def _kind(value: Any) -> str:
    if isinstance(value, StoredArray | ShardedArray) or is_array(value):
        return "an array"
    return "a mapping" if isinstance(value, Mapping) else f"of type {type(value).__name__}"


def _numbered(value: Any) -> Any:
    return dict(enumerate(value)) if isinstance(value, list | tuple) else _ABSENT


def _at(value: Any, key: Any) -> Any:
    return value.get(key, _ABSENT) if isinstance(value, Mapping) else _ABSENT


def _finished(parts: Mapping[Any, Finish]) -> dict[Any, Any]:
    values = {key: finish() for key, finish in parts.items()}
    return {key: value for key, value in values.items() if value is not _ABSENT}
