"""The second act of a save: one rank's pieces to the store; and reading them back.

A data file is a safetensors file: 8 bytes with the length of a JSON header (little-endian), the header,
then the bytes of the pieces one after another. The index beside it, sealed JSON, says what each piece is,
where it lies, and its digest, so every byte of the data file is accounted for: those of the header by one
digest, those of each piece by another.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainfleet.checkpoint.arrays import DTYPES, Bytes, num_bytes
from trainfleet.checkpoint.names import DATA, INDEX, Attempt
from trainfleet.checkpoint.regions import Region
from trainfleet.checkpoint.sealed import Damaged, RunningDigest, digest_of, seal, unseal
from trainfleet.checkpoint.staging import StagedPiece, StagedShard
from trainfleet.checkpoint.tree import Json
from trainfleet.errors import NotStored, StoreError
from trainfleet.store import Buffer, OpenBytes, Store

FORMAT = 1
"""The newest version of the format that this code reads, and the one it writes."""

_CHUNK_BYTES = 1 << 20  # hashed and then written while still in the cache


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPiece:
    path: str
    dtype: str
    region: Region
    begin: int
    """Its first byte in the data file."""
    end: int
    digest: str
    per_rank: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """What one rank stored."""

    rank: int
    data_name: str
    data_bytes: int
    header_bytes: int
    header_digest: str
    state: Json
    pieces: tuple[StoredPiece, ...]
    left_to_rank_0: tuple[str, ...]


def write_shard(store: Store, attempt: Attempt, rank: int, staged: StagedShard) -> None:
    """Store the data file, then the index: where the index stands, the data does too."""
    header, ends = _header(staged.pieces)
    digests: list[RunningDigest] = []
    data_name = attempt.stem(rank) + DATA
    data_bytes = store.put(data_name, _chunks(header, staged.pieces, digests))
    starts = [len(header), *ends[:-1]]
    index = {
        "format": FORMAT,
        "step": attempt.step,
        "run": attempt.run,
        "save": attempt.number,
        "rank": rank,
        "world_size": attempt.world_size,
        "data": {
            "name": data_name.partition("/")[2],
            "bytes": data_bytes,
            "header_bytes": len(header),
            "header_digest": digest_of(header),
        },
        "state": staged.state,
        "left_to_rank_0": list(staged.left_to_rank_0),
        "pieces": [
            {
                "path": piece.path,
                "dtype": piece.dtype,
                "offsets": list(piece.region.offsets),
                "shape": list(piece.region.shape),
                "begin": begin,
                "end": end,
                "digest": str(digest),
                "per_rank": piece.per_rank,
            }
            for piece, begin, end, digest in zip(staged.pieces, starts, ends, digests)
        ],
    }
    store.put(attempt.stem(rank) + INDEX, seal("index", index))


def read_index(data: bytes, name: str, folder: str) -> Index:
    """The index in `data`; Damaged if it is not as it was written."""
    body = unseal(data, name, "index")
    try:
        file = body["data"]
        pieces = tuple(_piece(piece, file) for piece in body["pieces"])
        if not 0 <= file["header_bytes"] <= file["bytes"]:
            raise ValueError("its header is longer than its data file")
        return Index(
            rank=int(body["rank"]),
            data_name=f"{folder}/{file['name']}",
            data_bytes=int(file["bytes"]),
            header_bytes=int(file["header_bytes"]),
            header_digest=str(file["header_digest"]),
            state=dict(body["state"]),
            pieces=pieces,
            left_to_rank_0=tuple(body["left_to_rank_0"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{name}: is no index as this version writes it ({type(error).__name__}: {error})") from error


def _piece(piece: Json, data: Json) -> StoredPiece:
    """ValueError where its numbers contradict each other."""
    found = StoredPiece(
        path=piece["path"],
        dtype=piece["dtype"],
        region=Region(tuple(piece["offsets"]), tuple(piece["shape"])),
        begin=piece["begin"],
        end=piece["end"],
        digest=piece["digest"],
        per_rank=piece["per_rank"],
    )
    if (
        not all(type(text) is str for text in (found.path, found.dtype, found.digest))
        or type(found.per_rank) is not bool
    ):
        raise ValueError("a piece has no path, dtype or digest")
    numbers = [*found.region.offsets, *found.region.shape, found.begin, found.end, data["header_bytes"], data["bytes"]]
    lies = all(type(number) is int and number >= 0 for number in numbers)
    lies = lies and len(found.region.offsets) == len(found.region.shape)
    lies = lies and data["header_bytes"] <= found.begin <= found.end <= data["bytes"]
    if not lies or found.end - found.begin != num_bytes(found.dtype, found.region.shape):
        raise ValueError(f"the piece of {found.path} does not lie in the data file as its shape says")
    return found


class DataFile:
    """A data file held open. Its length and header are checked at once, each piece as it is read."""

    def __init__(self, store: Store, index: Index) -> None:
        self._index = index
        self._scratch: Bytes | None = None
        try:
            self._file: OpenBytes = store.open(index.data_name)
        except NotStored as error:
            raise Damaged(f"{index.data_name}: missing") from error
        try:
            self._check_header()
        except BaseException:
            self._file.close()
            raise

    def _check_header(self) -> None:
        if self._file.size != self._index.data_bytes:
            raise Damaged(
                f"{self._index.data_name}: has {self._file.size} bytes; {self._index.data_bytes} were written"
            )
        header = np.empty(self._index.header_bytes, np.uint8)
        self._file.read_into(0, header.data)
        if digest_of(header) != self._index.header_digest:
            raise Damaged(f"{self._index.data_name}: its header does not match its digest")

    def read(self, piece: StoredPiece, target: Bytes) -> None:
        """Fill `target` with the bytes of the piece; Damaged if they are not those that were written."""
        self._read(piece, (target[at : at + _CHUNK_BYTES] for at in range(0, target.size, _CHUNK_BYTES)))

    def check(self, piece: StoredPiece) -> None:
        """Read the piece, and keep nothing of it; Damaged if it is not as it was written."""
        whole, rest = divmod(piece.end - piece.begin, _CHUNK_BYTES)
        if self._scratch is None:
            self._scratch = np.empty(_CHUNK_BYTES, np.uint8)
        self._read(piece, (self._scratch[:size] for size in [_CHUNK_BYTES] * whole + [rest] * bool(rest)))

    def _read(self, piece: StoredPiece, parts: Iterable[Bytes]) -> None:
        """Into the parts one after another, each hashed while it is still in the cache."""
        digest, at = RunningDigest(), piece.begin
        try:
            for part in parts:
                self._file.read_into(at, part.data)
                digest.update(part)
                at += part.size
        except StoreError as error:
            raise Damaged(f"{self._index.data_name}: {piece.path} cannot be read: {error}") from error
        if str(digest) != piece.digest:
            raise Damaged(f"{self._index.data_name}: {piece.path} does not match its digest")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _header(pieces: tuple[StagedPiece, ...]) -> tuple[bytes, list[int]]:
    """The first bytes of the data file, and where each piece ends in it."""
    entries: dict[str, Any] = {}
    at = 0
    ends = []
    for piece in pieces:
        name = piece.path
        if any(piece.region.offsets) or name in entries:
            name += "@" + ",".join(map(str, piece.region.offsets))
        while name in entries:
            name += "'"
        size = int(piece.data.size)
        code = DTYPES[piece.dtype].safetensors
        as_bytes = code == "U8" and piece.dtype != "uint8"
        shape = [size] if as_bytes else list(piece.region.shape)
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [at, at + size]}
        at += size
        ends.append(at)
    text = json.dumps({"__metadata__": {"format": "pt", "writer": "trainfleet"}} | entries, separators=(",", ":"))
    padded = text.encode()
    padded += b" " * (-len(padded) % 8)
    header = struct.pack("<Q", len(padded)) + padded
    return header, [len(header) + end for end in ends]


def _chunks(header: bytes, pieces: tuple[StagedPiece, ...], digests: list[RunningDigest]) -> Iterator[Buffer]:
    yield header
    for piece in pieces:
        digest = RunningDigest()
        data = piece.data.data
        for start in range(0, len(data), _CHUNK_BYTES):
            chunk = data[start : start + _CHUNK_BYTES]
            digest.update(chunk)
            yield chunk
        digests.append(digest)
