"""Text as windows of bytes or tokens: each sample is the input of a language model and what comes next."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainfleet.data.source import files_of
from trainfleet.errors import DataError
from trainfleet.imports import load_object

IN_MEMORY_BYTES = 1 << 28  # more than this stays on disk, mapped


class TextWindows:
    """Windows of `length` + 1 bytes of the files, in name order, one after the other:
    {"input": the first `length`, "target": the last `length`}, both int64.

    Windows begin every `stride` (default: `length`) and may run over the end of a file into the next.
    `part` takes a stretch of the whole, such as (0.0, 0.9) to train on and (0.9, 1.0) to evaluate on.
    `tokenizer`, a function from text to numbers or its import path, makes them windows of tokens; the
    tokens of all files are then made when the source is opened, and held in memory.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        length: int,
        pattern: str = "**/*.txt",
        stride: int | None = None,
        part: Sequence[float] = (0.0, 1.0),
        tokenizer: Callable[[str], Sequence[int]] | str | None = None,
    ) -> None:
        self.length, self.stride = length, stride or length
        if length < 1 or self.stride < 1:
            raise DataError(f"Text windows of length {length} every {self.stride} cannot be cut; both are at least 1.")
        if len(part) != 2 or not 0 <= part[0] < part[1] <= 1:
            raise DataError(f"part is {tuple(part)}; give two fractions in order, such as (0.0, 0.9).")
        files = files_of(path, pattern, what="text file")
        self._name = f"text {files[0]}" + (f" and {len(files) - 1} more files" if len(files) > 1 else "")
        tokenize = load_object(tokenizer, key="tokenizer") if isinstance(tokenizer, str) else tokenizer
        self._text = _Bytes(files) if tokenize is None else _tokens(files, tokenize)
        total = len(self._text)
        self._begin, self._end = (int(total * fraction) for fraction in part)
        if len(self) < 1:
            raise DataError(
                f"{self._name}: the part {tuple(part)} holds {max(0, self._end - self._begin)} "
                f"{'tokens' if tokenize else 'bytes'}, fewer than one window of {length} + 1. "
                "Use a shorter length, or more text."
            )

    def __len__(self) -> int:
        return max(0, (self._end - self._begin - self.length - 1) // self.stride + 1)

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        if not 0 <= index < len(self):
            raise IndexError(f"Window {index} is not among the {len(self)} of {self._name}.")
        begin = self._begin + index * self.stride
        window = self._text[begin : begin + self.length + 1].astype(np.int64)
        return {"input": window[:-1], "target": window[1:]}

    def __repr__(self) -> str:
        return self._name


class _Bytes:
    """The bytes of files as if they were one: read whole where they are few, mapped where they are many."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [os.fspath(file) for file in files]
        sizes = [file.stat().st_size for file in files]
        self._ends = np.cumsum(np.array(sizes, np.int64))
        self._whole: NDArray[np.uint8] | None = None
        if len(self) <= IN_MEMORY_BYTES:
            self._whole = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
            if len(self._whole) != len(self):
                raise DataError(f"The {len(files)} text files from {files[0]} on changed while they were read.")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, window: slice) -> NDArray[np.uint8]:
        if self._whole is not None:
            return self._whole[window]
        begin, end = int(window.start), int(window.stop)
        pieces = []
        number = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            file_begin = int(self._ends[number - 1]) if number else 0
            until = min(end, int(self._ends[number]))
            if until > begin:
                pieces.append(_mapped(self._files[number])[begin - file_begin : until - file_begin])
            begin, number = until, number + 1
        return np.concatenate(pieces)


@lru_cache(maxsize=256)  # maps, of which a process may not have too many
def _mapped(file: str) -> NDArray[np.uint8]:
    return np.memmap(file, np.uint8, mode="r")


def _tokens(files: Sequence[Path], tokenize: Callable[[str], Sequence[int]]) -> Any:
    pieces = []
    for file in files:
        try:
            pieces.append(np.asarray(tokenize(file.read_text(encoding="utf-8", errors="replace")), np.int64))
        except Exception as exc:
            raise DataError(f"The tokenizer failed on {file}: {type(exc).__name__}: {exc}") from exc
    tokens = np.concatenate(pieces)
    return tokens.astype(np.int32) if tokens.size and tokens.max() < 1 << 31 else tokens
