"""What sources in shards have in common: which shard has a sample, fetching it, and reading ahead of the order."""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

from trainfleet.data.order import Blocks
from trainfleet.data.shards.ahead import ReadAhead
from trainfleet.data.shards.cache import Damaged, Fetch, ShardCache
from trainfleet.errors import DataError

CACHE = "~/.cache/trainfleet/shards"
CACHE_BYTES = 16 << 30
WINDOW_BYTES = 4 << 30
"""A quarter of the cache: the window in use, the next one on its way, and what other readers have beside."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard: how many samples it has, and where it is or how it is had."""

    title: str
    """For people: its address."""
    samples: int
    num_bytes: int | None
    """Of the file that is read here, unpacked; None where nobody knows before it is there."""
    name: str = ""
    """In the cache."""
    fetch: Fetch | None = None
    path: Path | None = None
    """Of a file of this host that is read where it lies."""


class ShardedSource:
    """Samples by index, of shards that are fetched whole when the first of their samples is asked for.

    A subclass reads one: `_sample(shard, descriptor, row)`, by number of the shard. Its batches come in windows of
    `window` shards (None: as many as 4 GiB hold, and at least 2), which must fit the cache.
    """

    def __init__(self, shards: Sequence[Shard], cache: ShardCache | None, *, window: int | None, title: str) -> None:
        self.title, self.cache = title, cache
        self.shards = [shard for shard in shards if shard.samples]
        if not self.shards:
            raise DataError(f"{title} holds no sample.")
        self._ends = list(accumulate(shard.samples for shard in self.shards))
        self.blocks = Blocks(
            tuple(shard.samples for shard in self.shards), self._window() if window is None else window
        )
        self.still_there: Callable[[], None] = _nothing
        self._healed: set[int] = set()
        self._ahead: ReadAhead | None = None
        self._expected: tuple[Sequence[int], Sequence[int]] = ((), ())
        self._check_room()

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:
        return self.title

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None, "_expected": ((), ()), "still_there": _nothing}

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"Sample {index} is not among the {len(self)} of {self!r}.")
        number = bisect_right(self._ends, index)
        row = index - self._ends[number] + self.shards[number].samples
        try:
            return self._read(number, row)
        except Damaged as exc:
            shard = self.shards[number]
            if shard.fetch is None or number in self._healed:
                raise DataError(f"{shard.title} is damaged: {exc}") from exc
            # Sound where it came from, for it was checked, and not here: once anew.
            self._healed.add(number)
            assert self.cache is not None
            self.cache.remove(shard.name)
            self._forget(number)
        try:
            return self._read(number, row)
        except Damaged as exc:
            raise DataError(f"{shard.title} is damaged, and was when fetched anew: {exc}") from exc

    def expect(self, present: Sequence[int], ahead: Sequence[int]) -> None:
        """Fetch, behind the scenes, what is missing of these shards, in this order."""
        if self.cache is None or (present, ahead) == self._expected:
            return
        self._expected = (present, ahead)
        if self._ahead is None or self._ahead.pid != os.getpid():  # a thread is not forked with its process
            self._ahead = ReadAhead(self.cache)
        wanted = [self.shards[number] for number in (*present, *ahead)]
        keep = {shard.name for shard in wanted}
        self._ahead.expect([(s.name, s.fetch, s.num_bytes) for s in wanted if s.fetch is not None], keep)

    def close(self) -> None:
        """End reading ahead; may be called twice."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _sample(self, number: int, descriptor: int, row: int) -> Any:
        raise NotImplementedError

    def _forget(self, number: int) -> None:
        """What is remembered of a shard that is fetched anew."""

    def _read(self, number: int, row: int) -> Any:
        descriptor = self.open_shard(number)
        try:
            return self._sample(number, descriptor, row)
        finally:
            os.close(descriptor)

    def open_shard(self, number: int) -> int:
        """A descriptor of the shard's file, to be closed soon."""
        shard = self.shards[number]
        if shard.path is not None:
            return open_local(shard.path, shard.num_bytes)
        assert self.cache is not None and shard.fetch is not None
        self.cache.still_there = self.still_there
        return self.cache.open(shard.name, shard.fetch, num_bytes=shard.num_bytes)

    def _window(self) -> int:
        known = [shard.num_bytes for shard in self.shards if shard.num_bytes is not None]
        return min(len(self.shards), max(2, WINDOW_BYTES * len(known) // max(1, sum(known))) if known else 8)

    def _check_room(self) -> None:
        """A cache that cannot hold a window would fetch shards again and again."""
        if self.cache is None:
            return
        sizes = sorted((shard.num_bytes or 0 for shard in self.shards if shard.fetch is not None), reverse=True)
        window = self.blocks.window
        if sum(sizes[:window]) > self.cache.max_bytes:
            fits = max(1, bisect_right(list(accumulate(sizes)), self.cache.max_bytes))
            raise DataError(
                f"{self.title} is read in windows of {window} shards, of {sum(sizes[:window])} bytes together, and the "
                f"cache may hold {self.cache.max_bytes}: shards would be fetched again and again.",
                hint=f"Give cache_bytes={sum(sizes[: 2 * window])} or more, or window={fits} on all hosts.",
            )


def open_local(path: Path, num_bytes: int | None) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise DataError(f"The shard {path} cannot be opened: {exc.strerror}.") from exc
    size = os.fstat(descriptor).st_size
    if num_bytes is not None and size != num_bytes:
        os.close(descriptor)
        raise DataError(f"The shard {path} has {size} bytes, and should have {num_bytes} by its index. Copy it again.")
    return descriptor


def read_at(descriptor: int, begin: int, count: int) -> bytes:
    """`count` bytes from `begin`; Damaged where the file ends before."""
    data = os.pread(descriptor, count, begin)
    while len(data) < count:
        more = os.pread(descriptor, count - len(data), begin + len(data))
        if not more:
            raise Damaged(f"it ends at byte {begin + len(data)}, where {count - len(data)} more are expected.")
        data += more
    return data


def cached_name(url: str, detail: str = "") -> str:
    """The name of a URL's file in the cache: a digest, and the end of the URL for people."""
    end = re.sub(r"[^A-Za-z0-9._-]", "_", url.split("?")[0].rstrip("/").rsplit("/", 1)[-1])[-60:]
    return f"{hashlib.blake2b(f'{url} {detail}'.encode(), digest_size=10).hexdigest()}-{end.removesuffix('.part')}"


Columns: TypeAlias = Sequence[str] | Mapping[str, str] | None
"""Those to read: by name, or {name in a sample: column}; None for all under their own names."""


def chosen(columns: Columns, present: Collection[str], what: str) -> dict[str, str]:
    """{name in a sample: column}; DataError for columns that are not there."""
    if columns is None:
        columns = list(present)
    named = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    missing = [column for column in named.values() if column not in present]
    if missing:
        raise DataError(f"{what} has no column {', '.join(missing)}. It has {', '.join(sorted(present))}.")
    return named


def _nothing() -> None:
    """Nobody waits."""
