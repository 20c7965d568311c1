"""Rows of Parquet, Arrow and Feather files, read by row group or record batch as they are needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainfleet.data.source import files_of
from trainfleet.data.tabular import check_columns
from trainfleet.deps import require
from trainfleet.errors import DataError

IN_MEMORY_BYTES = 1 << 30  # a shuffled order touches every group all the time: below this, hold them all


class ArrowTable:
    """Row i of the files, in name order, as {column: value}.

    Numbers become NumPy scalars, equal-sized lists of numbers arrays, the rest Python values. Parquet is
    read a row group at a time, Arrow and Feather files are memory-mapped. Tables of less than 1 GiB are
    held whole; of larger ones the last `groups` groups are, so write small row groups for shuffled reading.
    """

    def __init__(
        self, path: str | Path | Sequence[str | Path], *, columns: Sequence[str] | None = None, groups: int = 16
    ) -> None:
        _pyarrow()
        self._files = _table_files(path)
        self._columns = list(columns) if columns is not None else None
        self._groups = groups
        self._places: list[tuple[int, int]] = []  # group -> (file, group in the file)
        self._ends = np.zeros(0, np.int64)  # group -> rows up to and with it
        self._scan()
        self._open: dict[int, Any] = {}
        self._cache: OrderedDict[int, dict[str, Any]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} is not among the {len(self)} rows of {self!r}.")
        group = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[group - 1]) if group else 0)
        return {key: column[row] for key, column in self._load_group(group).items()}

    def __repr__(self) -> str:
        return f"table {self._files[0]}" + (f" and {len(self._files) - 1} more" if len(self._files) > 1 else "")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_cache": OrderedDict()}

    def _scan(self) -> None:
        rows: list[int] = []
        num_bytes = 0
        for number, file in enumerate(self._files):
            opened = _open_table(file)
            names = opened.schema_arrow.names if _is_parquet(file) else opened.schema.names
            check_columns(self._columns or [], names, str(file))
            if _is_parquet(file):
                meta = opened.metadata
                counts = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
                num_bytes += sum(meta.row_group(g).total_byte_size for g in range(meta.num_row_groups))
            else:
                counts = [opened.get_batch(b).num_rows for b in range(opened.num_record_batches)]
                num_bytes += file.stat().st_size
            self._places += [(number, group) for group in range(len(counts))]
            rows += counts
        self._ends = np.cumsum(np.array(rows, np.int64))
        if num_bytes <= IN_MEMORY_BYTES:
            self._groups = max(self._groups, len(rows))

    def _load_group(self, group: int) -> dict[str, Any]:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        number, place = self._places[group]
        file = self._files[number]
        if number not in self._open:
            self._open[number] = _open_table(file)
        opened = self._open[number]
        if _is_parquet(file):
            # One thread: pyarrow's own pool does not survive a fork.
            table = opened.read_row_group(place, columns=self._columns, use_threads=False)
        else:
            table = opened.get_batch(place)
            table = table.select(self._columns) if self._columns else table
        self._cache[group] = {key: rows_of(table.column(key)) for key in table.schema.names}
        while len(self._cache) > self._groups:
            self._cache.popitem(last=False)
        return self._cache[group]


def rows_of(column: Any) -> Any:
    """Indexable rows: an array where every row is a number or an equal-sized list of them."""
    import pyarrow as pa

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
    numeric = pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)
    if numeric and not array.null_count:
        return array.to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(array.type) and not array.null_count:
        flat = array.flatten()
        if (pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type)) and not flat.null_count:
            return flat.to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
    rows = array.to_pylist()
    is_list = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    if is_list and (pa.types.is_integer(array.type.value_type) or pa.types.is_floating(array.type.value_type)):
        dtype = array.values.to_numpy(zero_copy_only=False).dtype if not array.values.null_count else None
        return [None if row is None else np.array(row, dtype) for row in rows]
    return rows


def _table_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    files = files_of(path, "*", what="Parquet or Arrow file")
    tables = [file for file in files if file.suffix in (".parquet", ".pq", ".arrow", ".feather", ".ipc")]
    if not tables:
        raise DataError(f"{files[0]} is no Parquet or Arrow file; names end with .parquet, .arrow or .feather.")
    return tables


def _is_parquet(file: Path) -> bool:
    return file.suffix in (".parquet", ".pq")


def _open_table(file: Path) -> Any:
    pa = _pyarrow()
    import pyarrow.parquet

    try:
        if _is_parquet(file):
            return pyarrow.parquet.ParquetFile(file, memory_map=True)
        return pa.ipc.open_file(pa.memory_map(str(file)))
    except (pa.ArrowInvalid, OSError) as exc:
        raise DataError(f"{file} cannot be read as a table: {exc}") from exc


def _pyarrow() -> Any:
    return require("pyarrow", "data", purpose="Reading Parquet and Arrow")
