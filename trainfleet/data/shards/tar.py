"""WebDataset: tar archives whose files that share a name up to the first dot are a sample."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from trainfleet.data.shards.addresses import Address, addresses
from trainfleet.data.shards.cache import Damaged, Part, ShardCache
from trainfleet.data.shards.contents import Contents, find_contents
from trainfleet.data.shards.counts import UNKNOWN, counted, index_folder, write_whole
from trainfleet.data.shards.encodings import checked_mode, decode_file
from trainfleet.data.shards.fetch import RemoteFile, local_path, shown
from trainfleet.data.shards.sharded import CACHE, CACHE_BYTES, Shard, ShardedSource, cached_name, read_at
from trainfleet.errors import DataError

MAX_FILE_BYTES = 2 << 30
"""Of one file of a sample, which is read into memory."""
HELD_SAMPLES = 2_000_000
"""Samples whose places a process remembers, at some 60 bytes each."""
COMPRESSED = {".gz": "gz", ".tgz": "gz", ".bz2": "bz2", ".zst": "zstd"}


class TarShards(ShardedSource):
    """Sample i of a WebDataset, {ending: value}: images as uint8 (channels, height, width), cls an int64, txt a str,
    json, npy and npz what they hold (nothing is unpickled), other files their bytes.

    url            of the shards: `https://…/train-{000..127}.tar`, a list of such, a folder or a pattern of this host,
                   or a JSON index with a `shardlist`. Compressed ones (.tar.gz, .tgz, .tar.bz2, .tar.zst) are unpacked
    columns        endings to read, or {name in a sample: ending}; `jpg;png` is the first of these that is there
    key            name under which a sample has its key; None: it has not
    mode           images as RGB, L or RGBA; None: as they are
    cache          folder for fetched shards and, in index/, for what is found in them: how many samples there are, and
                   where they lie, is read from all shards once
    cache_bytes, window, timeout, options     as for MosaicShards
    """

    def __init__(
        self,
        url: str | Path | Sequence[str | Path],
        *,
        columns: Sequence[str] | Mapping[str, str] | None = None,
        key: str | None = None,
        mode: str | None = "RGB",
        cache: str | Path = CACHE,
        cache_bytes: int = CACHE_BYTES,
        window: int | None = None,
        timeout: float = 60.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        asked = {"options": dict(options or {}), "timeout": timedelta(seconds=timeout)}
        found = addresses(url, **asked)
        shared = ShardCache(cache, cache_bytes)
        self._index = index_folder(shared)
        self._known: OrderedDict[str, Contents] = OrderedDict()
        self._columns = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns or ()}
        self._key, self._mode = key, checked_mode(mode)
        title = f"WebDataset {shown(found[0].url)} ({len(found)})"
        shards = counted([self._shard(address, asked) for address in found], shared, self._count, title=title)
        super().__init__(shards, shared, window=window, title=title)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known": OrderedDict()}

    def _sample(self, number: int, descriptor: int, row: int) -> dict[str, Any]:
        contents = self._contents(number, descriptor)
        files = contents.files(row)
        wanted = self._columns or {ending: ending for ending in files}
        sample = {} if self._key is None else {self._key: contents.keys[row]}
        for name, column in wanted.items():
            ending = next((one for one in column.split(";") if one in files), None)
            if ending is None:
                raise DataError(f"The sample {contents.keys[row]} has no {column}, but {', '.join(sorted(files))}.")
            begin, size = files[ending]
            if size > MAX_FILE_BYTES:
                raise DataError(f"{contents.keys[row]}.{ending} has {size} bytes; {MAX_FILE_BYTES} are the most.")
            try:
                sample[name] = decode_file(ending, memoryview(read_at(descriptor, begin, size)), self._mode)
            except Damaged:
                raise
            except DataError as exc:
                raise DataError(f"{contents.keys[row]}.{ending}: {exc}") from exc
        return sample

    def _forget(self, number: int) -> None:
        self._known.pop(self.shards[number].name, None)
        self._index_file(self.shards[number].name).unlink(missing_ok=True)

    def _contents(self, number: int, descriptor: int) -> Contents:
        """Of a shard that is open: remembered, or kept from when it was fetched, or found now."""
        shard = self.shards[number]
        if (known := self._known.get(shard.name)) is not None:
            self._known.move_to_end(shard.name)
            return known
        contents = _found(self._index_file(shard.name), descriptor, os.fstat(descriptor).st_size)
        if shard.samples != len(contents):
            raise Damaged(
                f"it has {len(contents)} samples, and {shard.samples} by its index. "
                f"If it was written anew, remove what is in {self._index}."
            )
        self._known[shard.name] = contents
        while len(self._known) > 1 and sum(map(len, self._known.values())) > HELD_SAMPLES:
            self._known.popitem(last=False)
        return contents

    def _count(self, shard: Shard, descriptor: int) -> tuple[int, int]:
        """(samples, bytes) of a shard that is open."""
        contents = _found(self._index_file(shard.name), descriptor, os.fstat(descriptor).st_size)
        return len(contents), contents.num_bytes

    def _index_file(self, name: str) -> Path:
        return self._index / f"{name}.json"

    def _shard(self, address: Address, asked: Mapping[str, Any]) -> Shard:
        """As far as it is known before it was looked at."""
        path = local_path(address.url)
        compression = COMPRESSED.get(Path(address.url.split("?")[0]).suffix)
        samples = UNKNOWN if address.samples is None else address.samples
        if path is not None:
            try:
                found = path.stat()
            except OSError as exc:
                raise DataError(f"The shard {path} cannot be read: {exc.strerror}.") from exc
            name = cached_name(str(path.absolute()), f"{found.st_size} {found.st_mtime_ns}")
            if compression is None:
                return Shard(title=str(path), samples=samples, num_bytes=found.st_size, name=name, path=path)
            url = f"file://{path.absolute()}"
        else:
            url, name = address.url, cached_name(address.url)
        file = RemoteFile(url=url, num_bytes=address.num_bytes, compression=compression, **asked)
        return Shard(
            title=shown(url),
            samples=samples,
            num_bytes=address.num_bytes if compression is None else None,
            name=name,
            fetch=partial(_fetched, file, self._index_file(name)),
        )


def _fetched(file: RemoteFile, index: Path, part: Part) -> None:
    """Fetch an archive and look what is in it, so that what is kept of its contents is of these bytes."""
    file.fetch(part)
    index.unlink(missing_ok=True)
    _found(index, part.descriptor, part.written)


def _found(file: Path, descriptor: int, num_bytes: int) -> Contents:
    try:
        kept = Contents.from_json(file.read_bytes(), num_bytes)
    except FileNotFoundError:
        kept = None
    if kept is None:
        kept = find_contents(descriptor, num_bytes)
        write_whole(file, kept.to_json())
    return kept
