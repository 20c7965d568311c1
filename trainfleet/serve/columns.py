"""Rows of many answers as one array a column, of exactly the dtype they have."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainfleet.errors import PeerError
from trainfleet.serve.memory import COLUMNS
from trainfleet.serve.terms import Answer

_FIRST_ROWS = 4096


class Columns:
    """Appends answers; arrays grow in place, so that no row is ever held twice.

    With `rows` their whole length is reserved at first, of which the system gives pages as they are written.
    """

    def __init__(self, rows: int | None = None) -> None:
        self.rows = 0
        self._reserved = rows or 0
        self._arrays: dict[str, NDArray[Any]] = {}

    @property
    def num_bytes(self) -> int:
        """Of the rows so far."""
        return sum(array[: self.rows].nbytes for array in self._arrays.values())

    def add(self, indices: NDArray[np.int64], answer: Answer) -> None:
        """The rows of a batch, with the sample that each is of."""
        found: dict[str, NDArray[Any]] = {"indices": indices}
        found |= {name: answer[name] for name in COLUMNS if name in answer}
        if not self._arrays:
            self._arrays = {
                name: np.empty((self._reserved, *column.shape[1:]), column.dtype) for name, column in found.items()
            }
        shapes = {name: (array.shape[1:], array.dtype) for name, array in self._arrays.items()}
        if {name: (column.shape[1:], column.dtype) for name, column in found.items()} != shapes:
            raise PeerError("A batch was answered with other columns than those before.")
        end = self.rows + len(found["indices"])
        if end > self._reserved:
            self._resize(max(end, self._reserved * 3 // 2, _FIRST_ROWS))
        for name, column in found.items():
            self._arrays[name][self.rows : end] = column
        self.rows = end

    def take(self) -> dict[str, NDArray[Any]]:
        """All rows by column, cut to their number; this is empty afterwards. Without an answer there is no column."""
        self._resize(self.rows)
        found, self._arrays, self.rows, self._reserved = self._arrays, {}, 0, 0
        return found

    def _resize(self, rows: int) -> None:
        for array in self._arrays.values():
            # In place: the allocator moves pages, and copies nothing that is large. Nobody else has seen the array.
            array.resize((rows, *array.shape[1:]), refcheck=False)
        self._reserved = rows
