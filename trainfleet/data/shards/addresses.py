"""The shards that an address means: braces, folders, patterns, lists, and the index of another tool."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainfleet.data.shards.fetch import RemoteFile, local_path, shown
from trainfleet.errors import DataError

MAX_SHARDS = 10_000_000
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
PATTERN = re.compile(r"[*?\[]")
REMOTE = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "oci")
ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.zst")


@dataclass(frozen=True)
class Address:
    url: str
    samples: int | None = None
    """As an index says; None where it has to be counted."""
    num_bytes: int | None = None
    """Of the file at the URL, as an index says."""


def addresses(url: str | Path | Sequence[str | Path], **asked: Any) -> list[Address]:
    """Of each shard, in order. `url`: one or several, with braces `{000..127}` or `{a,b}`; a folder or pattern of this
    host; or a JSON with a `shardlist`, read with what is `asked` of a RemoteFile."""
    several = [url] if isinstance(url, str | Path) else list(url)
    found = [one for address in several for one in _of_one(str(address), asked)]
    if not found:
        raise DataError(f"There is no shard at {', '.join(map(str, several))[:200] or 'no address'}.")
    return found


def _of_one(url: str, asked: dict[str, Any]) -> list[Address]:
    if url.startswith("pipe:"):
        raise DataError("A pipe: would run a command and is not read. Give the address, such as s3://… or https://….")
    found = []
    for one in expanded(url):
        path = local_path(one)
        if one.split("?")[0].endswith(".json"):
            found += _listed(one, asked)
        elif path is not None and path.is_dir():
            found += [Address(str(file)) for file in sorted(path.iterdir()) if file.name.endswith(ENDINGS)]
        elif path is not None and PATTERN.search(path.name) and not path.exists():
            found += [Address(str(file)) for file in sorted(path.parent.glob(path.name))]
        else:
            found.append(Address(one))
    return found


def expanded(url: str) -> list[str]:
    """`x{08..11}{a,b}` as x08a, x08b, ..., x11b: the digits keep their width."""
    pieces = BRACES.split(url)
    choices = [[piece] if i % 2 == 0 else _choices(piece) for i, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_SHARDS:
        raise DataError(f"{url[:200]} means {count} shards; {MAX_SHARDS} are the most.")
    return ["".join(choice) for choice in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    if (found := RANGE.fullmatch(inside)) is None:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    begin, end = int(found[1]), int(found[2])
    if abs(end - begin) >= MAX_SHARDS:
        raise DataError(f"{{{inside[:80]}}} means {abs(end - begin) + 1} shards; {MAX_SHARDS} are the most.")
    width = max(map(len, found.groups())) if "0" in (found[1][0], found[2][0]) else 0
    return [str(number).zfill(width) for number in range(begin, end + 1)] or [
        str(number).zfill(width) for number in range(begin, end - 1, -1)
    ]


def _listed(url: str, asked: dict[str, Any]) -> list[Address]:
    """The shards of an index as `widsindex` writes it: {"shardlist": [{"url": ..., "nsamples": ...}, ...]}."""
    path = local_path(url)
    try:
        text = path.read_bytes() if path is not None else RemoteFile(url=url, **asked).read()
        plain = json.loads(text)
        base = plain.get("base") or plain.get("base_path") or (url.rsplit("/", 1)[0] if "/" in url else ".")
        return [
            Address(
                _joined(base, entry["url"], url),
                _count(entry["nsamples"], "nsamples"),
                None if entry.get("filesize") is None else _count(entry["filesize"], "filesize"),
            )
            for entry in plain["shardlist"]
        ]
    except OSError as exc:
        raise DataError(f"The index {path} cannot be read: {exc.strerror}.") from exc
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise DataError(f"{shown(url)} is no index with a `shardlist`: {type(exc).__name__}: {exc}") from exc


def _joined(base: str, url: str, index: str) -> str:
    """The address of a shard. An index from elsewhere cannot name files of this host."""
    if url.startswith("pipe:"):
        raise ValueError("a pipe: is not read")
    joined = url if "://" in url or url.startswith("/") else f"{base.rstrip('/')}/{url}"
    scheme = joined.partition("://")[0] if "://" in joined else "file"
    if local_path(index) is None and ("::" in joined or scheme not in (*REMOTE, index.partition("://")[0])):
        raise ValueError(f"it is from elsewhere and names {joined[:80]!r}")
    return joined


def _count(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise ValueError(f"{what} is {str(value)[:40]!r}")
    return value
