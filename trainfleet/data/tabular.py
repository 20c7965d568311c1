"""Tables in memory: CSV files and NumPy arrays, a sample being one row."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainfleet.data.source import files_of
from trainfleet.errors import DataError


class Rows:
    """Equally long columns; sample i is row i: {name: value}, or {"input": vector, "target": value}."""

    def __init__(
        self, columns: Mapping[str, Any], *, inputs: Sequence[str] | None, target: str | None, name: str
    ) -> None:
        self._name = name
        lengths = {key: len(column) for key, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{name}: the columns differ in length: {lengths}. Every array needs one row a sample.")
        self._length = next(iter(lengths.values()), 0)
        if target is None and inputs is None:
            self._columns = dict(columns)
            return
        chosen = list(inputs) if inputs is not None else [key for key in columns if key != target]
        check_columns(chosen + ([target] if target else []), list(columns), name)
        for key in chosen:
            if isinstance(columns[key], list):
                raise DataError(f"{name}: the column {key!r} is text and cannot be part of a numeric input.")
        self._columns = {"input": np.stack([np.asarray(columns[key], np.float32) for key in chosen], axis=-1)}
        if target is not None:
            self._columns["target"] = columns[target]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: column[index] for key, column in self._columns.items()}

    def __repr__(self) -> str:
        return self._name


class CsvTable(Rows):
    """Rows of CSV files with a header line.

    Whole columns become int64 where every value is an integer, float32 where every value is a number, and
    stay strings otherwise. `columns` chooses some; `target` (with `inputs`, by default all the others) gives
    samples {"input": float32 vector, "target": value}. `missing` is the number an empty field stands for.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        columns: Sequence[str] | None = None,
        inputs: Sequence[str] | None = None,
        target: str | None = None,
        delimiter: str = ",",
        missing: float | None = None,
    ) -> None:
        files = files_of(path, "*.csv", what="CSV file")
        wanted = list(columns) if columns is not None else None
        if wanted is None and inputs is not None:
            wanted = [*inputs, *([target] if target else [])]
        fields: dict[str, list[str]] = {}
        for file in files:
            _read_csv(file, fields, wanted, delimiter)
        name = f"CSV {files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        typed = {key: _typed(values, key, missing, name) for key, values in fields.items()}
        super().__init__(typed, inputs=inputs, target=target, name=name)


def _read_csv(file: Path, fields: dict[str, list[str]], wanted: list[str] | None, delimiter: str) -> None:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        rows = csv.reader(stream, delimiter=delimiter)
        header = next(rows, None)
        if header is None:
            raise DataError(f"{file} is empty; a CSV file begins with a line of column names.")
        if len(set(header)) < len(header):
            twice = sorted({key for key in header if header.count(key) > 1})
            raise DataError(f"{file} names the column {twice[0]!r} twice in its header. Give each its own name.")
        chosen = wanted if wanted is not None else header
        check_columns(chosen, header, str(file))
        if fields and set(fields) != set(chosen):
            raise DataError(f"{file} has the columns {header}, but the files before it {list(fields)}.")
        places = [(fields.setdefault(key, []), header.index(key)) for key in chosen]
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{file}, line {rows.line_num}: {len(row)} fields, but the header has {len(header)}. "
                    f"Is {delimiter!r} the delimiter, and is text with it quoted?"
                )
            for values, place in places:
                values.append(row[place])


def _typed(values: list[str], key: str, missing: float | None, name: str) -> Any:
    empty = [i for i, value in enumerate(values) if not value.strip()]
    if empty and len(empty) < len(values):
        filled = [value if value.strip() else "0" for value in values]
        numbers = _numbers(filled)
        if numbers is None:
            return values
        if missing is None:
            raise DataError(
                f"{name}: the numeric column {key!r} is empty in row {empty[0] + 1} and {len(empty) - 1} others. "
                "Say missing=0 (or another number) for what it stands for, or leave the column out."
            )
        numbers = numbers if float(missing).is_integer() else numbers.astype(np.float32)
        numbers[empty] = missing
        return numbers
    numbers = _numbers(values)
    return values if numbers is None else numbers


def _numbers(values: list[str]) -> Any:
    for dtype in (np.int64, np.float32):
        try:
            return np.array(values).astype(dtype)
        except (ValueError, OverflowError):
            continue
    return None


def check_columns(wanted: Sequence[str], present: Sequence[str], name: str) -> None:
    absent = [key for key in wanted if key not in present]
    if absent:
        raise DataError(f"{name} has no column {absent[0]!r}; it has {', '.join(present)}.")


class NumpyArrays(Rows):
    """Rows of arrays: a `.npy` file (memory-mapped), a `.npz` file, a folder of `.npy`, or arrays in memory.

    The keys of a sample are the names in the `.npz` or the mapping, or the files' names without `.npy`.
    Memory-mapped arrays are shared between workers, and read only where they are touched.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        arrays: Mapping[str, Any] | None = None,
        inputs: Sequence[str] | None = None,
        target: str | None = None,
    ) -> None:
        if (path is None) == (arrays is None):
            raise DataError("A NumPy source needs either a path or arrays in memory.")
        self._mapped: dict[str, Path] = {}
        if arrays is None:
            files = files_of(str(path), "*.npy", what="NumPy file")
            arrays = _load_npz(files[0]) if files[0].suffix == ".npz" else {f.stem: _map_npy(f) for f in files}
            if files[0].suffix != ".npz" and inputs is None and target is None:
                self._mapped = {f.stem: f for f in files}
        columns = {key: np.asanyarray(array) for key, array in arrays.items()}
        for key, array in columns.items():
            if array.ndim == 0:
                raise DataError(f"The array {key!r} is a single number; a source needs one row a sample.")
        super().__init__(columns, inputs=inputs, target=target, name=f"NumPy {path}" if path else "NumPy arrays")

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        return {key: np.array(value) for key, value in row.items()} if self._mapped else row

    def __getstate__(self) -> dict[str, Any]:
        # Maps go to another process by their path, not by their bytes.
        return {**self.__dict__, "_columns": {}} if self._mapped else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._columns.update({key: _map_npy(path) for key, path in self._mapped.items()})


def _map_npy(file: Path) -> Any:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as exc:
        raise DataError(f"{file} cannot be mapped as a NumPy array: {exc}") from exc


def _load_npz(file: Path) -> dict[str, Any]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError) as exc:
        raise DataError(f"{file} cannot be read as a NumPy archive: {exc}") from exc
