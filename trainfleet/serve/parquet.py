"""Parquet parts in a folder: each commits some rows and the place behind them in one rename."""

from __future__ import annotations

import io
import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainfleet.deps import require
from trainfleet.errors import DataError
from trainfleet.store.file import FileStore

_KEY = b"trainfleet"
_NAME = re.compile(r"part-(\d{6,})\.parquet")
_GROUP_BYTES = 8 << 20
_CHUNK_BYTES = 1 << 20
_SINGLE = {"classes": "class", "confidences": "confidence", "values": "value"}
"""Columns of one number a row are named in the singular, and are plain numbers."""
_PLURAL = {single: plural for plural, single in _SINGLE.items()}


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a part says of itself, in the metadata of its schema."""

    of: str
    """Digest of what all parts of the folder are of."""
    begin: int
    """The first row it answers for; those that were kept of `begin` to `end` stand in it."""
    end: int
    kept: int
    state: Any
    """Of the stream, behind its last batch."""

    def to_json(self) -> str:
        """DataError where the state of the stream is nothing that JSON has."""
        try:
            return json.dumps(self.__dict__)
        except TypeError as error:
            raise DataError(
                f"The place in the data cannot be written beside the predictions: {error}.",
                hint="Let the source's state_dict hold numbers, strings, lists and dicts with keys that are strings.",
            ) from error

    @classmethod
    def from_json(cls, text: bytes) -> Part:
        """ValueError or TypeError for what is none."""
        told = json.loads(text)
        if not isinstance(told, dict):
            raise ValueError("no part")
        part = cls(**told)
        numbers = (part.begin, part.end, part.kept)
        if not isinstance(part.of, str) or any(type(number) is not int for number in numbers):
            raise ValueError("no part")
        if not 0 <= part.begin <= part.end or not 0 <= part.kept <= part.end - part.begin:
            raise ValueError("no part")
        return part


def part_files(folder: Path) -> list[Path]:
    """By number."""
    found = [(int(match[1]), path) for path in folder.glob("part-*.parquet") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def write_part(store: FileStore, number: int, part: Part, columns: dict[str, NDArray[Any]]) -> int:
    """Put the part into the folder, wholly and for good, or not at all; its bytes. StoreError says why not."""
    pa, pq = _pyarrow()
    arrays, names = [], []
    for name, column in columns.items():
        rows, width = len(column), int(np.prod(column.shape[1:], dtype=np.int64))
        is_single = column.ndim == 1 or (name in _SINGLE and width == 1)
        flat = pa.array(column.reshape(-1))
        arrays.append(flat if is_single else pa.FixedSizeListArray.from_arrays(flat, width))
        names.append("index" if name == "indices" else _SINGLE.get(name, name) if is_single else name)
        assert rows == part.kept
    table = pa.table(arrays, names=names).replace_schema_metadata({_KEY: part.to_json().encode()})
    chunks = _Chunks()
    sink = io.BufferedWriter(chunks, _CHUNK_BYTES)  # there are headers of a few bytes among them
    row = sum(column.nbytes for column in columns.values()) // max(1, part.kept)
    # A group of rows is encoded in memory before it is written.
    groups = max(1024, _GROUP_BYTES // max(1, row))
    pq.write_table(
        table, pa.PythonFile(sink, mode="w"), use_dictionary=False, write_page_checksum=True, row_group_size=groups
    )
    sink.flush()
    size = store.put(part_name(number), chunks.taken())
    del table, arrays
    pa.default_memory_pool().release_unused()  # it would keep what a part took, and more with each
    return size


class _Chunks(io.RawIOBase):
    """What was written, piece by piece: one buffer would be copied as it grows."""

    def __init__(self) -> None:
        self._found: deque[bytes] = deque()

    def write(self, data: Any) -> int:
        self._found.append(bytes(data))
        return len(self._found[-1])

    def writable(self) -> bool:
        return True

    def taken(self) -> Iterator[bytes]:
        """Each once, and then no longer held."""
        while self._found:
            yield self._found.popleft()


def read_parts(folder: Path) -> Iterator[tuple[Path, Part]]:
    """Each part in order, after every page of it was read and held against its checksum.

    DataError names the part that is damaged, or whose forerunner is missing.
    """
    end = 0
    for number, path in enumerate(part_files(folder)):
        part = _read(path)
        if path.name != part_name(number) or part.begin != end:
            raise _unusable(path, f"the part before it is missing: {part_name(number)} was expected")
        end = part.end
        yield path, part


def read_columns(path: Path, part: Part) -> dict[str, NDArray[Any]]:
    """The columns of a part, by the names that Predictions has."""
    pa, pq = _pyarrow()
    try:
        table = pq.read_table(path, page_checksum_verification=True, partitioning=None)
        found = {}
        for name in table.column_names:
            column = table.column(name).combine_chunks()
            if pa.types.is_fixed_size_list(column.type):
                found[name] = column.flatten().to_numpy().reshape(part.kept, column.type.list_size)
            elif name in ("class", "confidence"):
                found[_PLURAL[name]] = column.to_numpy().reshape(part.kept, 1)
            else:
                found["indices" if name == "index" else _PLURAL.get(name, name)] = column.to_numpy()
        return found
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _unusable(path, str(error)) from error


def _read(path: Path) -> Part:
    pa, pq = _pyarrow()
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            part = Part.from_json((file.schema_arrow.metadata or {})[_KEY])
            rows = sum(batch.num_rows for batch in file.iter_batches())
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _unusable(path, str(error)) from error
    if rows != part.kept:
        raise _unusable(path, f"it holds {rows} rows, and {part.kept} were written")
    return part


def _unusable(path: Path, why: str) -> DataError:
    said = " ".join(why.split())[:200]
    return DataError(
        f"The part {path} cannot be used: {said}.",
        hint="Remove it and the parts after it, and the same command makes them again; or begin anew with --fresh.",
    )


def refuse_without_pyarrow() -> None:
    """DependencyError at once, not when the first part is full."""
    _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    purpose = "Writing predictions to Parquet"
    pa, pq = require("pyarrow", "data", purpose=purpose), require("pyarrow.parquet", "data", purpose=purpose)
    return pa, pq
