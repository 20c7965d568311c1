"""JSON that carries its own digest, so that no byte of it can change unseen.

    {"digest": "xxh3-128:0123456789abcdef0123456789abcdef",
    "kind":"manifest", ...the rest of one JSON object; the digest is that of all bytes from the second line on...

XXH3 tells accidental damage (2^-128 that it passes by chance) and costs a tenth of SHA-256; it does not
stop someone who forges a checkpoint on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

ALGORITHM = "xxh3-128"


class Damaged(Exception):
    """Stored bytes are not those that were written. Caught in `Checkpointer`, which turns to an older checkpoint."""


def digest_of(data: Any) -> str:
    return f"{ALGORITHM}:{xxhash.xxh3_128_hexdigest(data)}"


class RunningDigest:
    """A digest of bytes that come in chunks."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, chunk: Any) -> None:
        self._state.update(chunk)

    def __str__(self) -> str:
        return f"{ALGORITHM}:{self._state.hexdigest()}"


def seal(kind: str, body: Mapping[str, Any]) -> bytes:
    """The JSON of `body` with its digest in front. `kind` tells sealed files of one format from another's."""
    rest = json.dumps({"kind": kind, **body}, separators=(",", ":"), allow_nan=False).encode()[1:] + b"\n"
    return _first_line(rest) + rest


def unseal(data: bytes, name: str, kind: str) -> dict[str, Any]:
    """What was sealed; Damaged if a byte differs, or if it was sealed as another kind."""
    first, newline, rest = data.partition(b"\n")
    if first + newline != _first_line(rest):
        raise Damaged(f"{name}: its bytes do not match the digest they were sealed with")
    try:
        body: dict[str, Any] = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name}: is sealed, but is no JSON: {error}") from error
    if body.get("kind") != kind:
        raise Damaged(f"{name}: holds the bytes of another file, of kind {body.get('kind')!r}")
    return {key: value for key, value in body.items() if key not in ("digest", "kind")}


def _first_line(rest: bytes) -> bytes:
    return b'{"digest": "' + digest_of(rest).encode() + b'",\n'
