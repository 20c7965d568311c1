"""The files in a tar archive and where they lie, by its headers alone, which are not trusted.

ustar, GNU and pax headers (POSIX.1-2001). Nothing is written anywhere, and a name is only ever a name. Unlike
`tarfile`, which takes a broken header for the end of the archive, anything but a proper end is said: samples
must not go missing in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from trainfleet.data.shards.cache import Damaged
from trainfleet.data.shards.sharded import read_at

BLOCK = 512
MAX_NAME_BYTES = 1 << 20
"""Of a header that holds a long name or further attributes."""
REGULAR = b"0\x007"
WITHOUT_DATA = b"123456"


class Member(NamedTuple):
    name: str
    begin: int
    size: int


def members(descriptor: int, num_bytes: int) -> Iterator[Member]:
    """The regular files of the archive, in order; Damaged where it is cut off or no archive."""
    place, long_name, attributes = 0, None, dict[str, str]()
    while True:
        if place + BLOCK > num_bytes:
            raise Damaged(f"it is cut off at byte {num_bytes}: the two empty blocks that end an archive are missing.")
        header = read_at(descriptor, place, BLOCK)
        if not header.strip(b"\0"):
            return
        _check_sum(header, place)
        kind, size = header[156:157], _number(header[124:136], place)
        if "size" in attributes:
            size = _decimal(attributes["size"], place)
        begin = place + BLOCK
        if kind in WITHOUT_DATA:
            size = 0
        if begin + size > num_bytes:
            raise Damaged(f"it is cut off: what begins at byte {begin} has {size} bytes, and the archive {num_bytes}.")
        place = begin + -(-size // BLOCK) * BLOCK
        if kind in b"LKxg":
            if size > MAX_NAME_BYTES:
                raise Damaged(f"the header at byte {begin - BLOCK} is said to have {size} bytes.")
            data = read_at(descriptor, begin, size)
            if kind == b"L":
                long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                attributes = _attributes(data, begin)
            continue
        name = attributes.get("path") or long_name or _name(header)
        if kind == b"S" or any(key.startswith("GNU.sparse") for key in attributes):
            raise Damaged(f"its file {name[:80]!r} is stored with holes, which is not read. Write it without --sparse.")
        long_name, attributes = None, {}
        if kind in REGULAR and not name.endswith("/"):
            yield Member(name, begin, size)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _check_sum(header: bytes, place: int) -> None:
    digits = header[148:156].replace(b"\0", b" ").strip()
    told = int(digits, 8) if digits and all(48 <= byte < 56 for byte in digits) else -1
    summed = sum(header) - sum(header[148:156]) + 8 * 32
    # Some writers of old summed signed bytes.
    signed = summed - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    if told not in (summed, signed):
        raise Damaged(f"there is no header of a tar archive at byte {place}, where one has to be.")


def _number(field: bytes, place: int) -> int:
    """Octal digits; or, for what these cannot hold, a first byte of 128 and a binary number."""
    if field[0] == 0x80:
        found = int.from_bytes(field[1:], "big")
        if found < 1 << 62:
            return found
    digits = field.split(b"\0", 1)[0].strip()
    if all(48 <= byte < 56 for byte in digits):
        return int(digits or b"0", 8)
    raise Damaged(f"the header at byte {place} is garbled: {field[:12]!r} is no number.")


def _decimal(digits: str, place: int) -> int:
    if digits.isdecimal() and digits.isascii() and len(digits) < 19:
        return int(digits)
    raise Damaged(f"the header at byte {place} is garbled: {digits[:40]!r} is no size.")


def _attributes(data: bytes, place: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`, the length being that of the whole record."""
    found, begin = dict[str, str](), 0
    while begin < len(data) and data[begin] != 0:
        digits, space, _ = data[begin : begin + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = data[begin + len(digits) + 1 : begin + length]
        key, equals, value = record.partition(b"=")
        if length <= len(digits) + 1 or begin + length > len(data) or not equals or not value.endswith(b"\n"):
            raise Damaged(f"the attributes at byte {place + begin} are garbled.")
        found[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        begin += length
    return found
