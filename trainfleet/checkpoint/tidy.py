"""What a save removes: its own files when it fails, the leavings of others, checkpoints that are not kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence

from trainfleet.checkpoint.manifest import Manifest, read_indexes, read_manifest, readable_manifests
from trainfleet.checkpoint.names import DATA, FAILED, INDEX, MANIFEST, Attempt, folder_of, manifest_of, steps_and_files
from trainfleet.checkpoint.retention import Retention
from trainfleet.checkpoint.sealed import Damaged
from trainfleet.errors import CheckpointError, StoreError
from trainfleet.store import Store

logger = logging.getLogger(__name__)


def abandon(store: Store, attempt: Attempt, rank: int, reason: str) -> None:
    """Give back the room that a failed attempt took, and tell rank 0 why it need not wait. Best effort.

    Rank 0 gives up the attempt for all ranks; should its manifest stand already, that goes first. Another rank whose
    index stands leaves its files alone: rank 0 may have published them. If not, the next save clears them.
    """
    try:
        if rank == 0:
            if is_published(store, attempt):
                store.delete(manifest_of(attempt.step))
            for name in store.names(attempt.prefix):
                store.delete(name)
        elif not store.exists(attempt.stem(rank) + INDEX):
            store.delete(attempt.stem(rank) + DATA)
            store.put(attempt.stem(rank) + FAILED, json.dumps({"rank": rank, "reason": reason}).encode())
    except StoreError as error:
        logger.warning("After the failed save of step %d: %s", attempt.step, error)


def is_published(store: Store, attempt: Attempt) -> bool:
    """Whether the manifest that stands is that of this attempt."""
    try:
        return read_manifest(store, attempt.step).attempt == attempt
    except (Damaged, CheckpointError, StoreError):
        return False


def is_done(store: Store, attempt: Attempt, rank: int) -> bool:
    """Whether this rank's part in an attempt is done, as far as the store tells."""
    if rank == 0:
        return is_published(store, attempt)
    try:
        return store.exists(attempt.stem(rank) + INDEX)
    except StoreError:
        return False


def remove_checkpoint(store: Store, step: int, files: Sequence[str]) -> None:
    """The manifest first: from then on it is no checkpoint, wherever this is cut short."""
    store.delete(manifest_of(step))
    for file in files:
        store.delete(f"{folder_of(step)}/{file}")


def prune(store: Store, retention: Retention, distrusted: Collection[int] = ()) -> list[int]:
    """Remove the checkpoints that are not kept; which ones those were.

    Those of `distrusted` steps, in which damage was found, and those that lack a file or a part of one do not count.
    """
    manifests = readable_manifests(store)
    if not retention.removable([(each.step, each.metrics) for each in manifests]):
        return []
    damaged = {each.step for each in manifests[:-1] if each.step in distrusted or not _is_complete(store, each)}
    removable = retention.removable([(each.step, each.metrics) for each in manifests], damaged)
    files = steps_and_files(store.names())
    for step in removable:
        remove_checkpoint(store, step, [file for file in files.get(step, []) if file != MANIFEST])
    return removable


def _is_complete(store: Store, manifest: Manifest) -> bool:
    """Whether every file is there and as long as it was, which costs no reading of arrays."""
    try:
        sizes = {file.name: file.num_bytes for file in manifest.files}
        sizes |= {index.data_name: index.data_bytes for index in read_indexes(store, manifest)}
        for name, size in sizes.items():
            with store.open(name) as file:
                if file.size != size:
                    return False
    except (Damaged, StoreError):
        return False
    return True


def clear_leftovers(store: Store, attempt: Attempt) -> None:
    """Remove what attempts left that came to nothing or were replaced. A checkpoint with a bad manifest stays."""
    for step, files in steps_and_files(store.names()).items():
        listed: set[str] = set()
        if MANIFEST in files:
            try:
                manifest = read_manifest(store, step)
                listed = {file.name.partition("/")[2] for file in (*manifest.indexes, *manifest.files)}
            except (Damaged, CheckpointError):
                continue
        listed |= {name.removesuffix(INDEX) + DATA for name in listed if name.endswith(INDEX)}
        for file in files:
            if file not in listed and attempt.supersedes(file):
                store.delete(f"{folder_of(step)}/{file}")
