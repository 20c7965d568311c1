"""Which samples a tar archive holds, and where each of their files lies: found once, and kept as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainfleet.data.shards.cache import Damaged
from trainfleet.data.shards.members import members

FORMAT = 1
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
"""Folders and the part before the first dot are the key of a sample; the rest is what this file of it is called."""
META = re.compile(r"(?:.*/)?__[^/]*__(?:/|$)")


@dataclass(frozen=True)
class Contents:
    """Sample i has the files `first[i]` to `first[i + 1]`."""

    keys: list[str]
    endings: list[str]
    first: NDArray[np.int64]
    ending: NDArray[np.int32]
    begin: NDArray[np.int64]
    size: NDArray[np.int64]
    num_bytes: int

    def __len__(self) -> int:
        return len(self.keys)

    def files(self, row: int) -> dict[str, tuple[int, int]]:
        """{ending: (begin, size)} of a sample."""
        found = range(int(self.first[row]), int(self.first[row + 1]))
        return {self.endings[int(self.ending[i])]: (int(self.begin[i]), int(self.size[i])) for i in found}

    def to_json(self) -> str:
        arrays = {name: getattr(self, name).tolist() for name in ("first", "ending", "begin", "size")}
        plain = {"format": FORMAT, "num_bytes": self.num_bytes, "keys": self.keys, "endings": self.endings}
        return json.dumps(plain | arrays, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes, num_bytes: int) -> Contents | None:
        """None for what is not the contents of an archive of that size."""
        try:
            plain: dict[str, Any] = json.loads(text)
            if plain["format"] != FORMAT or plain["num_bytes"] != num_bytes:
                return None
            keys, endings = plain["keys"], plain["endings"]
            first, ending, begin, size = (
                np.array(plain[name], np.int64) for name in ("first", "ending", "begin", "size")
            )
            sound = (
                all(isinstance(word, str) for word in (*keys, *endings))
                and len(first) == len(keys) + 1
                and len(ending) == len(begin) == len(size) == first[-1]
                and first[0] == 0
                and bool((np.diff(first) > 0).all())
                and bool(((ending >= 0) & (ending < len(endings))).all())
                and bool(((begin >= 0) & (size >= 0) & (begin <= num_bytes - size)).all())
            )
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
            return None
        return cls(keys, endings, first, ending.astype(np.int32), begin, size, num_bytes) if sound else None


def find_contents(descriptor: int, num_bytes: int) -> Contents:
    """Read from the headers: files that follow each other and share a key are a sample.

    Files without a dot, hidden ones and `__NAME__` are none's. Damaged for two files of one name in a sample.
    """
    keys: list[str] = []
    first: list[int] = []
    rows: list[tuple[int, int, int]] = []
    endings: dict[str, int] = {}
    present: set[str] = set()
    for name, begin, size in members(descriptor, num_bytes):
        split = NAME.fullmatch(name)
        if split is None or META.match(name):
            continue
        key, ending = split[1], split[2].lower()
        if not keys or key != keys[-1]:
            keys.append(key)
            first.append(len(rows))
            present.clear()
        if ending in present:
            raise Damaged(f"its sample {key[:80]!r} has two files {ending[:40]!r}.")
        present.add(ending)
        rows.append((endings.setdefault(ending, len(endings)), begin, size))
    table = np.array(rows, np.int64).reshape(-1, 3)
    return Contents(
        keys,
        list(endings),
        np.array([*first, len(rows)], np.int64),
        table[:, 0].astype(np.int32),
        table[:, 1].copy(),
        table[:, 2].copy(),
        num_bytes,
    )
