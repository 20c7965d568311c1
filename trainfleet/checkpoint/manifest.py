"""The third act of a save: rank 0 waits for every shard through the Store, checks them, and publishes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from trainfleet.checkpoint.names import FAILED, INDEX, MANIFEST, Attempt, folder_of, manifest_of, steps_and_files
from trainfleet.checkpoint.regions import first_overlap, tiles
from trainfleet.checkpoint.sealed import Damaged, digest_of, seal, unseal
from trainfleet.checkpoint.shard import FORMAT, Index, StoredPiece, read_index
from trainfleet.checkpoint.tree import Json, StoredArray, decode, encode, stored_arrays
from trainfleet.errors import CheckpointError, NotStored, StoreError
from trainfleet.store import Store

logger = logging.getLogger(__name__)

_POLL_SECONDS = (0.005, 0.5)  # shortest pause between two looks for the shards, and longest


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedFile:
    """A file that the manifest accounts for: the index of a rank, which says the rest, or a further file."""

    name: str
    num_bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A checkpoint: that it is whole, and of what."""

    step: int
    order: int
    """The how manyeth checkpoint of this store it is. Clocks may go backwards and steps be taken again; this rises."""
    attempt: Attempt
    indexes: tuple[ListedFile, ...]
    """By rank."""
    files: tuple[ListedFile, ...]
    """Further files of the checkpoint: an export, what a save function wrote."""
    metadata: Json
    metrics: Mapping[str, float]
    """What was measured at this step, for the retention and for people."""
    saved_at: float
    """Seconds since 1970 by the clock of rank 0, which may be wrong; nothing depends on it."""


def write_manifest(store: Store, manifest: Manifest) -> None:
    body = {
        "format": FORMAT,
        "step": manifest.step,
        "order": manifest.order,
        "run": manifest.attempt.run,
        "save": manifest.attempt.number,
        "world_size": manifest.attempt.world_size,
        "indexes": [_listed(file) for file in manifest.indexes],
        "files": [_listed(file) for file in manifest.files],
        "metadata": manifest.metadata,
        "metrics": encode(dict(manifest.metrics), "metrics", _refuse_array),
        "saved_at": manifest.saved_at,
    }
    store.put(manifest_of(manifest.step), seal("manifest", body))


def read_manifest(store: Store, step: int) -> Manifest:
    """Damaged if it is missing or not as it was written; CheckpointError if this version cannot read it."""
    name = manifest_of(step)
    try:
        body = unseal(store.get(name), name, "manifest")
    except NotStored as error:
        raise Damaged(f"{name}: missing, so the save was not finished") from error
    try:
        return _manifest(body, name, step)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{name}: is no manifest as this version writes it ({type(error).__name__}: {error})") from error


def _manifest(body: dict[str, Any], name: str, step: int) -> Manifest:
    if body["format"] > FORMAT:
        raise CheckpointError(
            f"{name} has format {body['format']}, and this trainfleet reads formats up to {FORMAT}. "
            "Use the version that wrote it, or a newer one."
        )
    if body["step"] != step:
        raise Damaged(f"{name}: is the manifest of step {body['step']}")
    attempt = Attempt(step=step, run=str(body["run"]), number=int(body["save"]), world_size=int(body["world_size"]))
    folder = folder_of(step)
    indexes, files = (
        tuple(
            ListedFile(name=f"{folder}/{file['name']}", num_bytes=file["bytes"], digest=file["digest"])
            for file in body.get(kind, ())
        )
        for kind in ("indexes", "files")
    )
    if len(indexes) != attempt.world_size:
        raise ValueError(f"{len(indexes)} indexes of {attempt.world_size} ranks")
    return Manifest(
        step=step,
        order=int(body["order"]),
        attempt=attempt,
        indexes=indexes,
        files=files,
        metadata=body["metadata"],
        metrics={key: float(value) for key, value in decode(body.get("metrics", {}), "metrics").items()},
        saved_at=float(body.get("saved_at", 0.0)),
    )


def _listed(file: ListedFile) -> Json:
    return {"name": file.name.partition("/")[2], "bytes": file.num_bytes, "digest": file.digest}


def _refuse_array(array: Any) -> None:
    raise CheckpointError(f"{array.path} is an array; metrics are numbers.")


def read_indexes(store: Store, manifest: Manifest) -> list[Index]:
    """The indexes of all ranks; Damaged names every one that is not as it was written."""
    indexes, problems = [], []
    for rank, file in enumerate(manifest.indexes):
        try:
            data = store.get(file.name)
            if len(data) != file.num_bytes:
                raise Damaged(f"{file.name}: has {len(data)} bytes; {file.num_bytes} were written")
            if digest_of(data) != file.digest:
                raise Damaged(f"{file.name}: does not match its digest in the manifest")
            index = read_index(data, file.name, folder_of(manifest.step))
            if index.rank != rank:
                raise Damaged(f"{file.name}: is the index of rank {index.rank}, not {rank}")
            indexes.append(index)
        except NotStored:
            problems.append(f"{file.name}: missing")
        except (Damaged, StoreError) as error:
            problems.append(str(error))
    if problems:
        raise Damaged("\n".join(problems))
    return indexes


def publish(
    store: Store,
    attempt: Attempt,
    metadata: Mapping[str, Any],
    timeout: timedelta,
    *,
    metrics: Mapping[str, float] | None = None,
    add_files: Callable[[list[Index]], list[ListedFile]] = lambda indexes: [],
) -> Manifest:
    """Wait until every rank's shard is stored, check that they make a whole, and store the manifest.

    `add_files` stores further files, which are made of the shards and listed beside them.
    CheckpointError if a rank failed or is late, or the pieces leave a hole; then there is no manifest.
    """
    _wait_for_shards(store, attempt, timeout)
    files, indexes = [], []
    for rank in range(attempt.world_size):
        name = attempt.stem(rank) + INDEX
        data = store.get(name)
        files.append(ListedFile(name=name, num_bytes=len(data), digest=digest_of(data)))
        indexes.append(read_index(data, name, attempt.folder))
    check_whole(indexes)
    further = add_files(indexes)
    order = 1 + max((manifest.order for manifest in readable_manifests(store)), default=0)
    manifest = Manifest(
        step=attempt.step,
        order=order,
        attempt=attempt,
        indexes=tuple(files),
        files=tuple(further),
        metadata=dict(metadata),
        metrics=dict(metrics or {}),
        saved_at=time.time(),
    )
    write_manifest(store, manifest)
    return manifest


def readable_manifests(store: Store) -> list[Manifest]:
    """Of all steps, oldest commit first; those that cannot be read are left out."""
    found = []
    for step, files in steps_and_files(store.names()).items():
        if MANIFEST in files:
            try:
                found.append(read_manifest(store, step))
            except (Damaged, CheckpointError, StoreError) as error:
                logger.debug("Left out of the order of checkpoints: %s", error)
    return sorted(found, key=lambda manifest: manifest.order)


def check_whole(indexes: Sequence[Index]) -> None:
    """CheckpointError unless the pieces of each array make the whole of it, each element once."""
    arrays: dict[str, StoredArray] = {}
    pieces: dict[str, list[tuple[int, StoredPiece]]] = {}
    for index in indexes:
        for piece in index.pieces:
            if not piece.per_rank:
                pieces.setdefault(piece.path, []).append((index.rank, piece))
        for name, state in index.state.items():
            for array, per_rank in stored_arrays(decode(state, name)):
                if per_rank:
                    continue
                known = arrays.setdefault(array.path, array)
                if (known.dtype, known.shape) != (array.dtype, array.shape):
                    raise CheckpointError(
                        f"{array.path} is {array.dtype} {array.shape} on rank {index.rank} and "
                        f"{known.dtype} {known.shape} on a rank before; it must be one array."
                    )
    for path, array in arrays.items():
        held = pieces.get(path, [])
        regions = [piece.region for _, piece in held]
        pair = first_overlap(regions)
        if pair is not None:
            (a, _), (b, _) = held[pair[0]], held[pair[1]]
            raise CheckpointError(
                f"Ranks {a} and {b} both store the same elements of {path}. Of equal copies, "
                "give all but one a `replica` other than 0."
            )
        if not tiles(regions, array.shape):
            absent = [i.rank for i in indexes if path in i.left_to_rank_0]
            raise CheckpointError(
                f"No rank stores the whole of {path}, of shape {array.shape}: the {len(regions)} pieces leave a hole. "
                + (
                    f"It is an array of ranks {absent} that rank 0 does not have: make it a ShardedArray or PerRank."
                    if absent and not regions
                    else "One copy of each piece must have `replica` 0."
                )
            )


def _wait_for_shards(store: Store, attempt: Attempt, timeout: timedelta) -> None:
    begun = time.monotonic()
    shortest, longest = _POLL_SECONDS
    while True:
        there = set(store.names(attempt.prefix))
        missing = [rank for rank in range(attempt.world_size) if attempt.stem(rank) + INDEX not in there]
        if not missing:
            return
        for rank in missing:
            if attempt.stem(rank) + FAILED in there:
                told = json.loads(store.get(attempt.stem(rank) + FAILED))
                raise CheckpointError(f"Step {attempt.step} was not saved: rank {rank} failed: {told['reason']}")
        waited = time.monotonic() - begun
        if waited > timeout.total_seconds():
            raise CheckpointError(
                f"Step {attempt.step} was not saved: after {timeout.total_seconds():.0f} s the shards of ranks "
                f"{missing} are not in {attempt.folder}. See whether these ranks live, whether all hosts see the same "
                "folder, and whether the disk is slow; checkpoint.timeout_seconds is how long rank 0 waits."
            )
        time.sleep(min(max(waited / 10, shortest), longest))  # a tenth late at most, however long it takes
