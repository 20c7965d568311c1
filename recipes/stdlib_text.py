"""Text that every machine has: the source of its own Python standard library, as windows of bytes.

Files are sorted by path and joined into one array of bytes. About one file in twenty, chosen by a hash of
its path, is held out; windows of training and validation never share a file.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainfleet.errors import DataError

Split = Literal["train", "validation"]

HELD_OUT_ONE_IN = 20
MIN_BYTES = 1_000_000  # below this a model of a million parameters learns the text by heart
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """All the text of a folder, cut into what is learned from and what is held out."""

    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    num_files: int
    """Files read."""
    num_unreadable: int
    """Files skipped because they could not be read."""


class StdlibText:
    """Windows of `length` bytes and, as targets, the same windows one byte on.

    Sample i begins at byte i x `length` of its split; with `windows`, so many of them, spread evenly.
    """

    def __init__(
        self, split: Split = "train", length: int = 256, windows: int | None = None, folder: str | None = None
    ) -> None:
        if split not in ("train", "validation"):
            raise DataError(f"There is no split {split!r} of the text; use 'train' or 'validation'.")
        if length < 1:
            raise DataError(f"The length of a window is {length} bytes; use at least 1.")
        self.text = load_text(folder)
        self.length = length
        self._bytes = getattr(self.text, split)
        available = (len(self._bytes) - 1) // length
        if available < 1 or (windows is not None and not 1 <= windows <= available):
            raise DataError(
                f"The {split} split has {len(self._bytes)} bytes, {max(available, 0)} windows of {length}, "
                f"and {1 if windows is None else windows} were asked for. Use a smaller length or fewer windows."
            )
        self._len = available if windows is None else windows
        self._stride = available // self._len * length

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        if not 0 <= index < self._len:
            raise IndexError(f"Window {index} of {self._len}.")
        start = index * self._stride
        window = self._bytes[start : start + self.length + 1].astype(np.int64)
        return {"input": window[:-1], "target": window[1:]}

    def baselines(self) -> dict[str, float]:
        """Nats per byte that counting reaches on the held-out files: what a model has to beat."""
        return {
            "unigram": unigram_nats(self.text.train, self.text.validation),
            "trigram": trigram_nats(self.text.train, self.text.validation),
        }


@lru_cache(maxsize=2)
def load_text(folder: str | None = None) -> Text:
    """The Python source below `folder` (None: the standard library), read once a process; a second or less."""
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    parts: dict[Split, list[bytes]] = {"train": [], "validation": []}
    num_unreadable = 0
    for path in _source_files(root):
        try:
            content = (root / path).read_bytes()
        except OSError:
            num_unreadable += 1
            continue
        parts["validation" if _is_held_out(path) else "train"].append(content)
    num_files = sum(map(len, parts.values()))
    num_bytes = sum(len(content) for contents in parts.values() for content in contents)
    if num_bytes < MIN_BYTES:
        raise DataError(
            f"{root} holds {num_bytes} bytes of Python source in {num_files} files ({num_unreadable} more could not "
            f"be read), too little to train on: at least {MIN_BYTES} are needed.",
            hint="Name a folder of .py files as data.args.folder, or use a Python installed with its sources.",
        )
    train, validation = (np.frombuffer(b"".join(parts[split]), np.uint8) for split in ("train", "validation"))
    return Text(train=train, validation=validation, num_files=num_files, num_unreadable=num_unreadable)


def _source_files(root: Path) -> list[str]:
    """Paths of the .py files relative to `root`, with slashes, sorted."""
    found: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        below = Path(folder).relative_to(root)
        found += [(below / name).as_posix() for name in files if name.endswith(".py")]
    return sorted(found)


def _is_held_out(path: str) -> bool:
    return zlib.crc32(path.encode(errors="surrogateescape")) % HELD_OUT_ONE_IN == 0


def unigram_nats(train: NDArray[np.uint8], held_out: NDArray[np.uint8]) -> float:
    """Cross-entropy of the frequencies of single bytes, each counted once more than seen."""
    counts = np.bincount(train, minlength=256) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


def trigram_nats(train: NDArray[np.uint8], held_out: NDArray[np.uint8]) -> float:
    """Cross-entropy of a byte given the two before it, smoothed by shorter contexts.

    Witten-Bell: p_n(x | c) = (count(cx) + kinds(c) p_{n-1}(x | c')) / (count(c) + kinds(c)), where kinds(c) is how
    many different bytes followed c: a context that was followed by anything says little.
    """
    probability = np.full(len(held_out), 1 / 256)
    context, held_context = np.zeros(len(train), np.int64), np.zeros(len(held_out), np.int64)
    for order in range(3):
        if order:
            context, held_context = _longer(context, train, order), _longer(held_context, held_out, order)
        num_contexts = 256**order
        counts = np.bincount(context * 256 + train, minlength=num_contexts * 256).reshape(num_contexts, 256)
        seen, kinds = counts.sum(1)[held_context], np.count_nonzero(counts, axis=1)[held_context]
        mixed = (counts[held_context, held_out] + kinds * probability) / np.maximum(seen + kinds, 1)
        probability = np.where(seen > 0, mixed, probability)
    return float(-np.log(probability).mean())


def _longer(context: NDArray[np.int64], text: NDArray[np.uint8], order: int) -> NDArray[np.int64]:
    """Contexts of `order` bytes from those of one fewer; before the text there are zeros."""
    before = np.concatenate([np.zeros(order, np.int64), text[:-order]])
    longer: NDArray[np.int64] = before * 256 ** (order - 1) + context
    return longer
