"""Mosaic Data Shards: an index.json, and shards of samples whose columns lie behind each other.

The format (version 2) is that of MosaicML Streaming, read here directly. A shard, all integers little-endian uint32:

    samples · begin of sample 0 · ... · begin of the last · end of it · settings as JSON · sample 0 · sample 1 · ...

and a sample: the sizes of those columns that have no fixed one, then the columns. Columns of the encoding `pkl` are
refused: nothing is unpickled.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from trainfleet.data.shards.cache import Damaged, ShardCache
from trainfleet.data.shards.encodings import Decoder, checked_mode, decoder_of
from trainfleet.data.shards.fetch import COMPRESSIONS, MAX_DOCUMENT_BYTES, RemoteFile, local_path, shown
from trainfleet.data.shards.sharded import (
    CACHE,
    CACHE_BYTES,
    Columns,
    Shard,
    ShardedSource,
    cached_name,
    chosen,
    read_at,
)
from trainfleet.errors import DataError

Layout: TypeAlias = tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]
"""Names, encodings and fixed sizes (0: none) of the columns of a shard."""
MAX_SHARDS = 10_000_000
MAX_COLUMNS = 4096


class MosaicShards(ShardedSource):
    """Sample i of an MDS dataset, {column: value}: numbers as NumPy scalars, images as uint8 (channels, height, width).

    url            folder with the index.json: a path, or any URL that fsspec knows (s3://, https://, gs://, ...)
    split          a folder in it, such as train
    columns        those to read: names, or {name in a sample: column}; the others are not even decoded
    mode           images as RGB, L or RGBA; None: as they are
    cache          folder for fetched shards, shared by all processes of this host; shards that lie on this host and are
                   not compressed are read where they are
    cache_bytes    how much it may hold
    window         shards that are shuffled together; it is part of the order: alike on all hosts, and over a resume
    timeout        seconds for which a source that fails is tried again
    options        for the filesystem, such as keys and endpoints
    """

    def __init__(
        self,
        url: str | Path,
        *,
        split: str | None = None,
        columns: Columns = None,
        mode: str | None = "RGB",
        cache: str | Path = CACHE,
        cache_bytes: int = CACHE_BYTES,
        window: int | None = None,
        timeout: float = 60.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        base = str(url).rstrip("/") + (f"/{split}" if split else "")
        asked = {"options": dict(options or {}), "timeout": timedelta(seconds=timeout)}
        entries = read_index(_index_of(base, asked), shown(base))
        shards, self._layouts = [], []
        for entry, layout in entries:
            if entry["samples"]:
                shards.append(_shard(base, entry, asked))
                self._layouts.append(layout)
        names = entries[0][1][0]
        self._chosen = chosen(columns, names, f"The dataset {shown(base)}")
        self._mode = checked_mode(mode)
        self._decoders: dict[Layout, list[tuple[int, str, Decoder]]] = {}
        for layout in set(self._layouts):
            self._decoders[layout] = self._plan(layout, base)
        held = any(shard.fetch for shard in shards)
        super().__init__(
            shards, ShardCache(cache, cache_bytes) if held else None, window=window, title=f"MDS {shown(base)}"
        )

    def _plan(self, layout: Layout, base: str) -> list[tuple[int, str, Decoder]]:
        """(place among the columns, name in a sample, decoder) of each column that is read."""
        names, encodings, _ = layout
        missing = set(self._chosen.values()) - set(names)
        if missing:
            raise DataError(f"Some shards of {shown(base)} lack the columns {', '.join(sorted(missing))}.")
        places = {name: place for place, name in enumerate(names)}
        return [
            (places[column], name, decoder_of(encodings[places[column]], column, self._mode))
            for name, column in self._chosen.items()
        ]

    def _sample(self, number: int, descriptor: int, row: int) -> dict[str, Any]:
        shard, layout = self.shards[number], self._layouts[number]
        head = 4 * (shard.samples + 2)
        begin, end = struct.unpack("<II", read_at(descriptor, 4 * (row + 1), 8))
        assert shard.num_bytes is not None
        if not head <= begin <= end <= shard.num_bytes:
            raise Damaged(f"sample {row} is said to lie at bytes {begin} to {end}, of {shard.num_bytes}.")
        cells = cut(read_at(descriptor, begin, end - begin), layout[2])
        try:
            return {name: decode(cells[place]) for place, name, decode in self._decoders[layout]}
        except DataError as exc:
            raise type(exc)(f"Sample {row} of {shard.title}: {exc}") from exc


def cut(data: bytes, sizes: Sequence[int]) -> list[memoryview]:
    """The columns of a sample; Damaged where they do not fill it exactly."""
    floating = sum(not size for size in sizes)
    if len(data) < 4 * floating:
        raise Damaged(f"a sample of {len(data)} bytes cannot have {floating} columns.")
    told = iter(struct.unpack_from(f"<{floating}I", data))
    place, cells, view = 4 * floating, [], memoryview(data)
    for size in sizes:
        count = size or next(told)
        cells.append(view[place : place + count])
        place += count
    if place != len(data):
        raise Damaged(f"the columns of a sample say that they have {place} bytes, and it has {len(data)}.")
    return cells


def read_index(data: bytes, name: str) -> list[tuple[dict[str, Any], Layout]]:
    """The shards of an index.json and the layout of each; DataError, with what is wrong, for anything else."""
    try:
        found = json.loads(data)
        shards = found["shards"]
        assert isinstance(shards, list)
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as exc:
        raise DataError(f"{name}/index.json is no index of MDS shards: {type(exc).__name__}: {exc}") from exc
    if not 0 < len(shards) <= MAX_SHARDS:
        raise DataError(f"{name}/index.json names {len(shards)} shards.")
    known: dict[Layout, Layout] = {}
    entries = []
    for number, shard in enumerate(shards):
        try:
            layout = _layout(shard)
        except DataError as exc:
            raise DataError(f"Shard {number} of {name}/index.json: {exc}") from exc
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise DataError(f"Shard {number} of {name}/index.json lacks or garbles {exc}.") from exc
        entries.append((shard, known.setdefault(layout, layout)))
    return entries


def _layout(shard: Any) -> Layout:
    """Check one entry of the index."""
    if shard["format"] != "mds" or shard["version"] != 2:
        raise DataError(f"it is of format {str(shard['format'])[:20]!r}, version {shard['version']!r}; mds 2 is read.")
    _count(shard["samples"], "samples")
    for key in ("raw_data", "zip_data"):
        if (file := shard[key]) is None and key == "zip_data":
            continue
        _count(file["bytes"], "bytes")
        path = PurePosixPath(file["basename"])
        if path.is_absolute() or ".." in path.parts or not path.name or "\\" in file["basename"] or ":" in str(path):
            raise DataError(f"the file name {file['basename'][:80]!r} leads out of the dataset.")
        if not all(isinstance(digest, str) for digest in dict(file.get("hashes") or {}).values()):
            raise DataError("a hash is no text.")
    if shard["zip_data"] is not None and str(shard["compression"]).split(":")[0] not in COMPRESSIONS:
        raise DataError(f"it is compressed by {str(shard['compression'])[:20]}; {', '.join(COMPRESSIONS)} are read.")
    names, encodings = tuple(shard["column_names"]), tuple(shard["column_encodings"])
    sizes = tuple(_count(size or 0, "column size") for size in shard["column_sizes"])
    if not len(names) == len(encodings) == len(sizes) <= MAX_COLUMNS or not names:
        raise DataError(f"it has {len(names)} names of columns, {len(encodings)} encodings and {len(sizes)} sizes.")
    if not all(isinstance(word, str) for word in (*names, *encodings)) or len(set(names)) < len(names):
        raise DataError("a column has no name of its own, or no encoding.")
    if shard["samples"] and shard["raw_data"]["bytes"] < 4 * (shard["samples"] + 2):
        raise DataError(f"{shard['raw_data']['bytes']} bytes cannot hold {shard['samples']} samples.")
    return names, encodings, sizes


def _count(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise DataError(f"{what} is {str(value)[:40]!r}, which is no number of them.")
    return value


def _index_of(base: str, asked: Mapping[str, Any]) -> bytes:
    path = local_path(f"{base}/index.json")
    if path is None:
        return RemoteFile(url=f"{base}/index.json", **asked).read()
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise DataError(f"{path} has more than {MAX_DOCUMENT_BYTES} bytes.")
        return path.read_bytes()
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}. `url` is the folder with the index.json.") from exc


def _shard(base: str, entry: Mapping[str, Any], asked: Mapping[str, Any]) -> Shard:
    raw, packed = entry["raw_data"], entry["zip_data"]
    raw_path = local_path(f"{base}/{raw['basename']}")
    common = {"samples": entry["samples"], "num_bytes": raw["bytes"]}
    if raw_path is not None and (packed is None or raw_path.exists()):
        return Shard(title=str(raw_path), path=raw_path, **common)
    url = f"{base}/{(packed or raw)['basename']}"
    hashes, raw_hashes = dict((packed or raw).get("hashes") or {}), dict(raw.get("hashes") or {})
    file = RemoteFile(
        url=url if local_path(url) is None else f"file://{local_path(url)}",
        num_bytes=(packed or raw)["bytes"],
        hashes=hashes,
        compression=str(entry["compression"]).split(":")[0] if packed else None,
        raw_hashes=raw_hashes if packed else {},
        **asked,
    )
    name = cached_name(f"{base}/{raw['basename']}", f"{raw['bytes']} {sorted(raw_hashes.items())}")
    return Shard(title=shown(url), name=name, fetch=file.fetch, **common)
