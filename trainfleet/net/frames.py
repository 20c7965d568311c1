"""One message as one frame: a fixed checked header, a JSON head, the raw bytes of arrays, and their digest.

    magic   version  flags  buffer  head  arrays  payload  digest of head  digest of all before
    4s      u8       u8     u16     u32   u32     u64      8s              8s
    head    {"k": kind, "h": head}, a line feed, and the body's structure as JSON (net/structure.py)
    payload the arrays, each at a multiple of 64 bytes
    digest  XXH3-128 of the payload, where the flag says so

A payload in shared memory lies in the buffer of that number, and is not on the wire.

The header is 40 bytes, little-endian; both short digests are XXH3-64. Every limit is checked before memory is
got for what it limits.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, NamedTuple, TypeAlias

from xxhash import xxh3_64_digest

from trainfleet.errors import ConfigError, DataError, NotAdmitted, PeerError
from trainfleet.net.flat import Flat, Look, look_of
from trainfleet.net.structure import Bytes, Classes, NotAllowed, as_bytes, flatten, padded, survey

MAGIC: Final = b"TFfr"
VERSION: Final = 1
HEADER: Final = struct.Struct("<4sBBHIIQ8s8s")
DIGEST_BYTES: Final = 16

_json = json.JSONEncoder(separators=(",", ":")).encode
_read_json = json.JSONDecoder().raw_decode  # `loads` looks for white space, too, which nobody sends
DIGEST, SHARED, CODED = 1, 2, 4
"""Flags: a digest follows the payload; the payload lies in shared memory; it went through a codec."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a peer may ask of us; what is beyond is refused before memory is got for it."""

    max_bytes: int = 1 << 30
    """Of the arrays of one frame."""
    max_head_bytes: int = 1 << 20
    """Of everything else of one frame."""
    max_arrays: int = 1 << 16
    """Arrays and byte strings of one frame."""
    max_depth: int = 32
    """Of the nesting."""
    stall: timedelta = field(default=timedelta(seconds=30))
    """How long a peer may take to give or take 256 KiB of a frame that has begun, before it counts as gone."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_head_bytes", "max_arrays", "max_depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of a connection is {getattr(self, name)}; it must be at least 1.")
        if self.max_head_bytes >= 1 << 32 or self.max_depth > 200:
            raise ConfigError("A connection allows heads below 4 GiB, and no nesting deeper than 200.")
        if self.stall <= timedelta(0):
            raise ConfigError(f"stall of a connection is {self.stall}; it must be more than nothing.")


class Outgoing(NamedTuple):
    """A message ready to be written: `header(flags)`, then `head`, then `arrays`, each padded to 64 bytes."""

    head: bytes
    arrays: list[Bytes]
    num_bytes: int
    """Of the payload, padding included."""

    def header(self, flags: int, buffer: int = 0) -> bytes:
        facts = HEADER.pack(
            MAGIC,
            VERSION,
            flags,
            buffer,
            len(self.head),
            len(self.arrays),
            self.num_bytes,
            xxh3_64_digest(self.head),
            b"",
        )[:-8]
        return facts + xxh3_64_digest(facts)


class Header(NamedTuple):
    """The facts of a header that has been checked."""

    flags: int
    buffer: int
    head_bytes: int
    num_arrays: int
    num_bytes: int
    head_digest: bytes


class Incoming(NamedTuple):
    """A head that has been checked; its arrays take `num_bytes`."""

    kind: str
    head: dict[str, Any]
    tree: Any
    """As `survey` passed it, or what `Flat.of` made of that."""
    num_bytes: int
    refused: NotAllowed | None
    """The payload is to be read and thrown away, and this raised."""


MAX_KNOWN: Final = 16
"""Structures: batches of one stream are nearly always alike, and need not be walked through again."""
KNOWN_BYTES: Final = 1 << 12
Known: TypeAlias = dict[tuple[bytes, int, int], Any]
"""Those that have passed."""
Written: TypeAlias = dict[Look, str]
"""Structures as JSON that were sent before."""


def pack(kind: str, head: dict[str, Any] | None, body: Any, limits: Limits, written: Written | None = None) -> Outgoing:
    """A message ready to be written; DataError for what cannot travel or is beyond our own limits.

    `written` is kept by the caller.
    """
    look = None if written is None else look_of(body)
    structure = None if written is None or look is None else written.get(look)
    if structure is not None:
        tree, arrays = None, [as_bytes(array) for array in body.values()]
    else:
        tree, arrays = flatten(body, max_depth=limits.max_depth)
    try:
        text = f"{_json({'k': kind, 'h': head or {}})}\n{structure or _json(tree)}".encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise DataError(f"The head of a message {kind!r} cannot be written as JSON: {exc}.") from exc
    num_bytes = sum(padded(array.nbytes) for array in arrays)
    for name, value, limit in (
        ("arrays of", num_bytes, limits.max_bytes),
        ("a head of", len(text), limits.max_head_bytes),
        ("pieces counting", len(arrays), limits.max_arrays),
    ):
        if value > limit:
            unit = "" if name.startswith("pieces") else " bytes"
            raise DataError(
                f"A message {kind!r} has {name} {value:,}{unit}, and the limit is {limit:,}. "
                "Make batches smaller, or raise the limit at both ends."
            )
    if written is not None and look is not None and structure is None:
        if len(written) >= MAX_KNOWN:
            written.clear()
        written[look] = _json(tree)
    return Outgoing(text, arrays, num_bytes)


def read_header(data: bytes | bytearray | memoryview, limits: Limits) -> Header:
    """The facts of 40 bytes from a peer. Raises NotAdmitted for another version, PeerError for what cannot be."""
    magic, version, flags, buffer, head_bytes, num_arrays, num_bytes, head_digest, digest = HEADER.unpack(data)
    if magic != MAGIC:
        raise PeerError(
            f"What arrived is not a frame: it begins with {bytes(magic)!r}. Another program may have the port, "
            "or bytes were lost on the way."
        )
    if xxh3_64_digest(bytes(data[:-8])) != digest:
        raise PeerError("A frame's header was damaged on the way: its digest differs.")
    if version != VERSION:
        raise NotAdmitted(
            f"The peer speaks version {version} of frames, and we version {VERSION}. Install the same trainfleet there."
        )
    if flags & ~(DIGEST | SHARED | CODED) or (buffer and not flags & SHARED):
        raise PeerError(f"A frame has flags {flags:#x} that nobody sets.")
    if num_bytes <= limits.max_bytes and head_bytes <= limits.max_head_bytes and num_arrays <= limits.max_arrays:
        return Header(flags, buffer, head_bytes, num_arrays, num_bytes, head_digest)
    for name, value, limit in (
        ("arrays of {:,} bytes", num_bytes, limits.max_bytes),
        ("a head of {:,} bytes", head_bytes, limits.max_head_bytes),
        ("{:,} arrays", num_arrays, limits.max_arrays),
    ):
        if value > limit:
            raise PeerError(
                f"A frame announces {name.format(value)}, and the limit is {limit:,}. Raise it if it is meant."
            )
    raise AssertionError("one of them is beyond its limit")


def read_head(
    header: Header, data: bytes | bytearray | memoryview, limits: Limits, classes: Classes, known: Known | None = None
) -> Incoming:
    """The head of a frame, checked against its header; `known` is kept by the caller. PeerError for what cannot be."""
    if xxh3_64_digest(data) != header.head_digest:
        raise PeerError("A frame's head was damaged on the way: its digest differs.")
    try:
        first, _, structure = bytes(data).partition(b"\n")
        words = first.decode()
        whole, end = _read_json(words)
        if end != len(words):
            raise ValueError(f"there is more behind it: {words[end : end + 20]!r}")
        kind, head = whole["k"], whole["h"]
        key = (structure, header.num_arrays, header.num_bytes)
        if known is not None and key in known and type(kind) is str and type(head) is dict:
            return Incoming(kind, head, known[key], header.num_bytes, None)
        tree = json.loads(structure)
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise PeerError(f"A frame has a head that cannot be read: {type(exc).__name__}: {exc}.") from exc
    if type(kind) is not str or type(head) is not dict:
        raise PeerError("A frame has a head without a kind.")
    refused = None
    try:
        found = survey(
            tree,
            classes=classes,
            max_depth=limits.max_depth,
            max_arrays=header.num_arrays,
            max_bytes=header.num_bytes,
        )
        if found != header.num_bytes:
            raise PeerError(f"A frame announces {header.num_bytes:,} bytes, and its arrays take {found:,}.")
    except NotAllowed as exc:
        refused = exc
    if known is not None and refused is None and len(structure) <= KNOWN_BYTES:
        if len(known) >= MAX_KNOWN:
            known.clear()
        known[key] = tree = Flat.of(tree) or tree
    return Incoming(kind, head, tree, header.num_bytes, refused)
