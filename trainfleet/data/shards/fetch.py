"""A file at a URL into the cache: by fsspec, through breaks and pauses, unpacked on the way, checked at the end."""

from __future__ import annotations

import bz2
import hashlib
import logging
import re
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import xxhash

from trainfleet.data.shards.cache import Damaged, Part
from trainfleet.deps import require
from trainfleet.errors import DataError, TrainfleetError
from trainfleet.net.retry import pauses

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
BLOCK_BYTES = 8 << 20
"""What is asked for at a time where a file is read in ranges, as over HTTP."""
DAMAGED_TRIES = 3
AHEAD_SECONDS = 5.0
"""How long reading ahead tries a source that gives nothing: whoever needs the shard tries it for all of `timeout`."""
MAX_DOCUMENT_BYTES = 1 << 30
ZSTD_BYTES = 4 << 10
"""Unpacked at a time, for it has no bound of its own: a block of 4 bytes may stand for 128 KiB (RFC 8878, 3.1.1.2), so
these for 128 MiB."""
COMPRESSIONS = ("zstd", "gz", "bz2")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file at a URL, what is known about it, and how patient one is with who has it."""

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """For the filesystem: keys, endpoints, headers."""
    num_bytes: int | None = None
    """Of the file at the URL."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Algorithm and hex digest, of the file at the URL."""
    compression: str | None = None
    """zstd, gz or bz2: unpacked on its way."""
    raw_hashes: Mapping[str, str] = field(default_factory=dict)
    """Of what is unpacked."""
    timeout: timedelta = timedelta(seconds=60)
    """How long a source that fails is tried again, without a byte from it."""

    def fetch(self, part: Part) -> None:
        """Write it to `part`: go on where a connection broke, begin again where bytes are wrong; DataError at last."""
        damaged = 0
        while True:
            part.restart()
            try:
                self._fetch_once(part)
                return
            except Damaged as exc:
                damaged += 1
                if damaged == DAMAGED_TRIES:
                    raise DataError(f"{exc} It came so {DAMAGED_TRIES} times; is it whole where it lies?") from exc
                logger.warning("%s It is fetched again.", exc)

    def read(self) -> bytes:
        """All of a small file, such as an index."""
        taken = bytearray()
        self._receive(
            lambda data: taken.extend(data), lambda: MAX_DOCUMENT_BYTES - len(taken), self.timeout.total_seconds()
        )
        return bytes(taken)

    def _fetch_once(self, part: Part) -> None:
        stages = _Stages(self, part)
        self._receive(stages.feed, None, patience(self.timeout, part))
        stages.end()

    def _receive(self, take: Callable[[bytes], None], left: Callable[[], int] | None, most: float) -> None:
        """Feed the bytes of the file to `take`, in order, each once; after a pause it goes on where that broke off."""
        offset, since, waits, before = 0, time.monotonic(), pauses(0.1, 5.0), None
        while True:
            try:
                with closing(self._opened(offset)) as file:
                    size = self.num_bytes if self.num_bytes is not None else getattr(file, "size", None)
                    if offset and size != before:
                        raise Damaged(f"{shown(self.url)} had {before} bytes, and now has {size}: somebody writes it.")
                    before = size
                    while chunk := file.read(CHUNK_BYTES):
                        take(chunk)
                        offset, since, waits = offset + len(chunk), time.monotonic(), pauses(0.1, 5.0)
                        if left is not None and left() < 0:
                            raise DataError(f"{shown(self.url)} has more than {MAX_DOCUMENT_BYTES} bytes.")
                    if size is None or offset >= size:
                        return
                    raise ConnectionError(f"it ended after {offset} of {size} bytes")
            except TrainfleetError:
                raise
            except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as exc:
                raise DataError(
                    f"{shown(self.url)} cannot be read: {_words(exc)}. Check the address and the right to read it."
                ) from exc
            except Exception as exc:  # whatever the library of a protocol raises
                pause = next(waits)
                if time.monotonic() + pause - since > most:
                    raise DataError(
                        f"{shown(self.url)} could not be read for {most:g} s. The last try, at byte {offset}: "
                        f"{_words(exc)}."
                    ) from exc
                logger.debug("%s broke off at byte %d: %s", shown(self.url), offset, _words(exc))
                time.sleep(pause)

    def _opened(self, offset: int) -> Any:
        fsspec = _fsspec()
        filesystem, path = fsspec.core.url_to_fs(self.url, **self.options)
        file = filesystem.open(path, "rb", block_size=BLOCK_BYTES)
        try:
            # Where it cannot seek, what is known already is read once more and skipped.
            try:
                file.seek(offset)
            except (ValueError, OSError, NotImplementedError):
                skipped = 0
                while skipped < offset:
                    if not (again := file.read(min(CHUNK_BYTES, offset - skipped))):
                        raise ConnectionError(f"it ended after {skipped} bytes") from None
                    skipped += len(again)
        except BaseException:
            file.close()
            raise
        return file


def patience(timeout: timedelta, part: Part) -> float:
    """Seconds for which a source that gives nothing is tried again."""
    return min(timeout.total_seconds(), AHEAD_SECONDS) if part.ahead else timeout.total_seconds()


class _Stages:
    """Hash, unpack, hash again, write."""

    def __init__(self, file: RemoteFile, part: Part) -> None:
        self._file, self._part = file, part
        self._packed = [(name, hasher(name), digest) for name, digest in file.hashes.items()]
        self._raw = [(name, hasher(name), digest) for name, digest in file.raw_hashes.items()]
        self._unpacker = unpacker(file.compression) if file.compression else None
        self._taken = 0

    def feed(self, data: bytes) -> None:
        self._taken += len(data)
        for _, hashed, _ in self._packed:
            hashed.update(data)
        for piece in self._unpacked(data):
            for _, hashed, _ in self._raw:
                hashed.update(piece)
            self._part.write(piece)

    def end(self) -> None:
        if self._file.num_bytes is not None and self._taken != self._file.num_bytes:
            raise Damaged(f"{self._name} has {self._taken} bytes, and should have {self._file.num_bytes}.")
        if self._unpacker is not None and not self._unpacker.eof:
            raise Damaged(f"{self._name} ends in the middle of its {self._file.compression} data.")
        for name, hashed, digest in (*self._packed, *self._raw):
            if hashed.hexdigest() != digest:
                raise Damaged(f"{self._name} has the {name} {hashed.hexdigest()}, and should have {digest}.")

    @property
    def _name(self) -> str:
        return shown(self._file.url)

    def _unpacked(self, data: bytes) -> Any:
        if self._unpacker is None:
            yield data
            return
        try:
            yield from self._unpacker.pieces(data)
        except DataError:
            raise
        except Exception as exc:
            raise Damaged(f"{self._name} cannot be unpacked as {self._file.compression}: {exc}.") from exc


class Unpacker(Protocol):
    eof: bool

    def pieces(self, data: bytes) -> Any: ...


class _Zlib:
    """gzip, of one member or several behind each other."""

    def __init__(self) -> None:
        self._one, self.eof = zlib.decompressobj(31), False

    def pieces(self, data: bytes) -> Any:
        while data:
            if self._one.eof:
                if not data.strip(b"\0"):  # padding
                    return
                self._one = zlib.decompressobj(31)
            # A bounded piece at a time: a few bytes may unpack to a thousand times as many.
            while out := self._one.decompress(data, CHUNK_BYTES):
                yield out
                data = self._one.unconsumed_tail
            data = self._one.unused_data if self._one.eof else b""
            self.eof = self._one.eof


class _Bz2:
    def __init__(self) -> None:
        self._one, self.eof = bz2.BZ2Decompressor(), False

    def pieces(self, data: bytes) -> Any:
        while data or not (self._one.eof or self._one.needs_input):
            if self._one.eof:
                self._one = bz2.BZ2Decompressor()
            yield self._one.decompress(data, CHUNK_BYTES)
            data = self._one.unused_data if self._one.eof else b""
            self.eof = self._one.eof


class _Zstd:
    def __init__(self) -> None:
        self._library = require("zstandard", "shards", purpose="Reading zstd shards")
        self._one, self.eof = self._library.ZstdDecompressor().decompressobj(), False

    def pieces(self, data: bytes) -> Any:
        for begin in range(0, len(data), ZSTD_BYTES):
            rest = data[begin : begin + ZSTD_BYTES]
            while rest:
                if self._one.eof:
                    self._one = self._library.ZstdDecompressor().decompressobj()
                yield self._one.decompress(rest)
                rest = self._one.unused_data if self._one.eof else b""
                self.eof = self._one.eof


def unpacker(compression: str) -> Unpacker:
    kinds: dict[str, Callable[[], Unpacker]] = {"zstd": _Zstd, "gz": _Zlib, "bz2": _Bz2}
    if compression not in kinds:
        raise DataError(
            f"Shards compressed by {compression!r} are not read here. Write them as {', '.join(kinds)}, or plain."
        )
    return kinds[compression]()


def hasher(name: str) -> Any:
    """A hash of hashlib or xxhash by its name."""
    if name in xxhash.algorithms_available:
        return getattr(xxhash, name)()
    if name in hashlib.algorithms_available and not name.startswith("shake"):
        return hashlib.new(name, usedforsecurity=False)
    raise DataError(f"The index names the hash {name[:40]!r}, which nobody here knows; write it with sha1 or xxh64.")


def local_path(url: str) -> Path | None:
    """The path of a URL that names a file of this host."""
    if url.startswith("file://"):
        return Path(unquote(urlsplit(url).path))
    return None if "://" in url or "::" in url else Path(url).expanduser()


def shown(url: str) -> str:
    """A URL without what is secret in it."""
    return re.sub(r"//[^/@]*@", "//", url).split("?")[0]


def _words(exc: BaseException) -> str:
    words = str(exc) or getattr(exc, "strerror", None) or ""
    return f"{type(exc).__name__}: {shown(str(words))}" if words else type(exc).__name__


def _fsspec() -> Any:
    fsspec = require("fsspec", "shards", purpose="Reading shards from a URL")
    require("fsspec.core", "shards", purpose="Reading shards from a URL")
    return fsspec
