"""Arrays in safetensors files, one file or several with an index; read without torch, each when it is wanted."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainfleet.checkpoint.arrays import DTYPES, Bytes, num_bytes
from trainfleet.checkpoint.foreign.pieces import ForeignArray, check_shape, whole_array
from trainfleet.errors import CheckpointError

_MOST_HEADER_BYTES = 100_000_000  # the limit of the format itself
_MOST_INDEX_BYTES = 100_000_000
_LENGTH = struct.Struct("<Q")
_DTYPES = {dtype.safetensors: name for name, dtype in DTYPES.items() if not name.startswith("complex")}
_DTYPES["C64"] = "complex64"


def arrays_in_file(file: Path) -> list[ForeignArray]:
    """The arrays of one file, which is opened again to read each; CheckpointError if it is no safetensors file."""
    try:
        with file.open("rb") as opened:
            size = file.stat().st_size
            first = opened.read(_LENGTH.size)
            if len(first) < _LENGTH.size:
                raise CheckpointError(f"{file} is no safetensors file: it has {size} bytes.")
            length = _LENGTH.unpack(first)[0]
            if length > min(_MOST_HEADER_BYTES, size - _LENGTH.size):
                raise CheckpointError(
                    f"{file} is no whole safetensors file: its header would have {length} bytes; the file has {size}."
                )
            header = opened.read(length)
        return list(_arrays(file, header, begin=_LENGTH.size + length, end=size))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error


def arrays_in_folder(folder: Path) -> list[ForeignArray]:
    """The arrays of all files that an index in the folder names; without one, of all safetensors files in it."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise CheckpointError(f"{folder} has {len(indexes)} indexes, such as {indexes[0].name}; name a file in it.")
    if indexes:
        return _indexed(indexes[0])
    files = [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []
    return _joined(files or sorted(folder.glob("*.safetensors")))


def _indexed(index: Path) -> list[ForeignArray]:
    wanted = _weight_map(index)
    found = {array.name: array for array in _joined([index.parent / name for name in sorted(set(wanted.values()))])}
    if unlike := sorted(wanted.keys() ^ found.keys()):
        where = "named by the index and in no file" if unlike[0] in wanted else "in a file and not named by the index"
        raise CheckpointError(f"{index} does not belong to the files beside it: {unlike[0]} is {where}.")
    return [found[name] for name in wanted]


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds which array."""
    try:
        if index.stat().st_size > _MOST_INDEX_BYTES:
            raise ValueError(f"it has {index.stat().st_size} bytes")
        names = json.loads(index.read_bytes())["weight_map"]
        if not isinstance(names, dict) or not names:
            raise ValueError("its weight_map is empty or no mapping")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of safetensors files: {error}.") from error
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{index} is no index of safetensors files: {name!r} is no file beside it.")
    return names


def _joined(files: list[Path]) -> list[ForeignArray]:
    found: dict[str, ForeignArray] = {}
    for file in files:
        for array in arrays_in_file(file):
            if array.name in found:
                raise CheckpointError(f"{array.name} is in two files of {file.parent}, one of them {file.name}.")
            found[array.name] = array
    return list(found.values())


def _arrays(file: Path, header: bytes, *, begin: int, end: int) -> Iterator[ForeignArray]:
    """What the header says, checked: the arrays lie one after another and fill the rest of the file."""
    try:
        entries: dict[str, Any] = json.loads(header, object_pairs_hook=_without_twins)
        if not isinstance(entries, dict):
            raise ValueError("it is no mapping")
        entries.pop("__metadata__", None)
        placed = sorted(entries.items(), key=lambda entry: _offsets(*entry))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no whole safetensors file: its header cannot be read: {error}.") from error
    at = begin
    for name, entry in placed:
        start, stop = (begin + offset for offset in _offsets(name, entry))
        dtype = _DTYPES.get(str(entry.get("dtype")))
        shape = check_shape(f"{name} in {file}", dtype or entry.get("dtype"), entry.get("shape"))
        if start != at or stop > end or stop - start != num_bytes(str(dtype), shape):
            raise CheckpointError(
                f"{file} is no whole safetensors file: {name}, of {dtype} {list(shape)}, would lie from byte {start} "
                f"to {stop}, where the one before ends at {at} and the file at {end}."
            )
        at = stop
        yield whole_array(name, str(dtype), shape, _Reading(file, name, start, stop))
    if at != end:
        raise CheckpointError(f"{file} is no whole safetensors file: {end - at} bytes at its end belong to no array.")


class _Reading:
    """Reads some bytes of a file."""

    def __init__(self, file: Path, name: str, begin: int, end: int) -> None:
        self._file, self._name, self._begin, self._end = file, name, begin, end

    def __call__(self) -> Bytes:
        data = np.empty(self._end - self._begin, np.uint8)
        view = data.data
        try:
            with self._file.open("rb", buffering=0) as opened:
                opened.seek(self._begin)
                while len(view):
                    count = opened.readinto(view)
                    if not count:
                        raise CheckpointError(f"{self._file} ends within {self._name}; it was cut short meanwhile.")
                    view = view[count:]
        except OSError as error:
            raise CheckpointError(f"{self._file} cannot be read: {error.strerror or error}.") from error
        return data


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise ValueError(f"{name!r} does not say where its data lies")
    return offsets[0], offsets[1]


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found
