"""Payloads made smaller on their way, where the link is so slow that it pays; by zstd or lz4, if they are installed.

A payload of n bytes takes n / link seconds as it is, and n / speed + n / (ratio * link) when it is made smaller first.
The link's rate is what recent sends have shown; speed and ratio come from a sample of the payload itself, so pixels
that do not get smaller travel as they are, and on a fast network nothing is ever tried.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from trainfleet.deps import installed, require
from trainfleet.errors import PeerError
from trainfleet.net.structure import Bytes, padded

NAMES: Final = ("zstd", "lz4")
_MODULES: Final = {"zstd": "zstandard", "lz4": "lz4.block"}
PREFIX: Final = struct.Struct("<BQ")
"""Before a coded payload: the codec's place among `NAMES`, and the coded length."""

WORTH_BYTES: Final = 1 << 16  # below this a frame is mostly waiting
SAMPLE_BYTES: Final = 1 << 17
FAST_LINK: Final = 250e6  # bytes a second; one core makes nothing smaller as fast as that
MARGIN: Final = 0.9  # of the plain time, or it is not worth the processors
TRY_EVERY: Final = 64  # frames between samples
MEASURED_BYTES: Final = 1 << 25
"""Over which the link's rate is an average; the first few megabytes only fill the kernel's buffers."""


def available() -> list[str]:
    """Those that this process could read and write."""
    return [name for name in NAMES if installed(_MODULES[name])]


class Coded(NamedTuple):
    """A payload made smaller."""

    prefix: bytes
    data: Bytes


class Compression:
    """The choice for one direction of one connection. `common` are the codecs that both ends have."""

    def __init__(self, common: Sequence[str]) -> None:
        self._common = [name for name in common if name in NAMES]
        self._bytes = self._seconds = 0.0
        self._choice: str | None = None
        self._frames_left = 0

    def learn(self, num_bytes: int, seconds: float) -> None:
        """So long a send of so many bytes took, as they went over the link."""
        keep = max(0.0, 1 - num_bytes / MEASURED_BYTES)
        self._bytes, self._seconds = self._bytes * keep + num_bytes, self._seconds * keep + seconds

    @property
    def bytes_per_second(self) -> float | None:
        """Of the link; None while too little has been sent."""
        return self._bytes / self._seconds if self._bytes >= MEASURED_BYTES / 2 and self._seconds else None

    def made_smaller(self, arrays: Sequence[Bytes], num_bytes: int) -> Coded | None:
        """The payload coded; None where it is better sent as it is."""
        rate = self.bytes_per_second
        if not self._common or num_bytes < WORTH_BYTES or rate is None or rate > FAST_LINK:
            return None
        if self._frames_left == 0:
            self._choice, self._frames_left = self._best(arrays, num_bytes, rate), TRY_EVERY
        self._frames_left -= 1
        if self._choice is None:
            return None
        data = np.frombuffer(encode(self._choice, _joined(arrays, num_bytes)), np.uint8)
        if data.nbytes >= num_bytes:
            return None
        return Coded(PREFIX.pack(NAMES.index(self._choice), data.nbytes), data)

    def _best(self, arrays: Sequence[Bytes], num_bytes: int, rate: float) -> str | None:
        part = max(1, num_bytes // SAMPLE_BYTES)  # the beginning of each, in proportion
        sample = np.concatenate([array[: array.nbytes // part] for array in arrays])
        best, least = None, MARGIN / rate
        for name in self._common:
            began = time.thread_time()
            smaller = len(encode(name, sample))
            seconds = (time.thread_time() - began + smaller / rate) / max(1, sample.nbytes)
            if seconds < least:
                best, least = name, seconds
        return best


def encode(name: str, data: Bytes) -> bytes:
    """Coded by one of `NAMES`; zstd at level 1."""
    module = _module(name)
    if name == "zstd":
        return bytes(module.ZstdCompressor(level=1).compress(data))
    return bytes(module.compress(data.data, store_size=False))


def decode(name: str, data: Bytes, into: Bytes) -> None:
    """Fill `into`, and get no more memory than it has, whatever the bytes say. Raises PeerError."""
    module = _module(name)
    try:
        if name == "zstd":
            with module.ZstdDecompressor(max_window_size=1 << 23).stream_reader(data) as reader:
                filled = 0
                while filled < into.nbytes and (got := reader.readinto(into[filled:])):
                    filled += got
                whole = filled == into.nbytes and not reader.read(1)
        else:
            plain = module.decompress(data.data, uncompressed_size=into.nbytes)
            whole = len(plain) == into.nbytes
            if whole:
                into[:] = np.frombuffer(plain, np.uint8)
    except (ValueError, RuntimeError, OSError, _error_of(module)) as exc:
        raise PeerError(f"A frame's payload cannot be read by {name}: {exc}.") from exc
    if not whole:
        raise PeerError(f"A frame's payload was made smaller by {name} from another length than it announces.")


def _error_of(module: Any) -> type[Exception]:
    error: type[Exception] = getattr(module, "ZstdError", None) or module.LZ4BlockError
    return error


def name_at(place: int) -> str:
    if place >= len(NAMES):
        raise PeerError(f"A frame's payload went through codec {place}, which nobody has.")
    return NAMES[place]


def _module(name: str) -> Any:
    return require(_MODULES[name], "net", purpose=f"Payloads made smaller by {name}")


def _joined(arrays: Sequence[Bytes], num_bytes: int) -> Bytes:
    """As they would lie on the wire: each padded to 64 bytes."""
    whole, begin = np.zeros(num_bytes, np.uint8), 0
    for array in arrays:
        whole[begin : begin + array.nbytes] = array
        begin += padded(array.nbytes)
    return whole
