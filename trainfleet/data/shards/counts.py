"""How many samples shards hold that do not say it: looked up once, and kept beside the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainfleet.data.shards.cache import Damaged, ShardCache
from trainfleet.data.shards.sharded import Shard, open_local
from trainfleet.errors import DataError

logger = logging.getLogger(__name__)

UNKNOWN = -1
LOOKERS = 4
"""Shards that are fetched at once to be looked at."""


def index_folder(cache: ShardCache) -> Path:
    folder = cache.folder / "index"
    folder.mkdir(exist_ok=True)
    return folder


def counted(
    shards: list[Shard], cache: ShardCache, look: Callable[[Shard, int], tuple[int, int]], *, title: str
) -> list[Shard]:
    """The shards with their samples and bytes: as they say, or kept from before, or by fetching and looking at them.

    `look(shard, descriptor)` gives both.
    """
    named = hashlib.blake2b(json.dumps([shard.name for shard in shards]).encode(), digest_size=12).hexdigest()
    file = index_folder(cache) / f"{named}.counts"
    counts = kept_counts(file)
    for shard in shards:
        if shard.samples != UNKNOWN:
            counts[shard.name] = (shard.samples, shard.num_bytes)
    missing = [shard for shard in shards if shard.name not in counts]
    if missing:
        logger.info("Looking once through %d shards of %s for their samples.", len(missing), title)
        with ThreadPoolExecutor(LOOKERS) as pool:
            for shard, count in zip(missing, pool.map(lambda shard: _looked_at(shard, cache, look), missing)):
                counts[shard.name] = count
        write_whole(file, json.dumps(counts))
    return [
        dataclasses.replace(shard, samples=counts[shard.name][0], num_bytes=counts[shard.name][1]) for shard in shards
    ]


def _looked_at(shard: Shard, cache: ShardCache, look: Callable[[Shard, int], tuple[int, int]]) -> tuple[int, int]:
    try:
        if shard.path is not None:
            descriptor = open_local(shard.path, shard.num_bytes)
        else:
            assert shard.fetch is not None
            descriptor = cache.open(shard.name, shard.fetch, num_bytes=shard.num_bytes)
        try:
            return look(shard, descriptor)
        finally:
            os.close(descriptor)
    except Damaged as exc:
        raise DataError(f"{shard.title} is damaged: {exc}") from exc


def kept_counts(file: Path) -> dict[str, tuple[int, int | None]]:
    """{name of a shard: (samples, bytes)}; empty where nothing was kept, or what was is garbled."""
    try:
        plain = json.loads(file.read_bytes())
        found = {name: (samples, num_bytes) for name, (samples, num_bytes) in plain.items()}
        sound = all(
            type(samples) is int and samples >= 0 and (num_bytes is None or (type(num_bytes) is int and num_bytes >= 0))
            for samples, num_bytes in found.values()
        )
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        logger.warning("%s is garbled; what it says is looked up again.", file)
        return {}
    return found


def write_whole(file: Path, text: str) -> None:
    """Whole or not at all, whoever else writes the same."""
    draft = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        draft.write_text(text)
        draft.replace(file)
    except OSError as exc:
        draft.unlink(missing_ok=True)
        raise DataError(f"The index of shards {file} cannot be written: {exc.strerror}.") from exc
