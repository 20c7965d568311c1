"""What stands in a store: which checkpoints, of what, how large, and whether they are whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainfleet.checkpoint.further import verify_further
from trainfleet.checkpoint.loading import verify_shards
from trainfleet.checkpoint.manifest import Manifest, read_indexes, read_manifest
from trainfleet.checkpoint.names import folder_of, manifest_of, step_of, steps_and_files
from trainfleet.checkpoint.restore import surplus_files
from trainfleet.checkpoint.sealed import Damaged
from trainfleet.checkpoint.shard import Index
from trainfleet.checkpoint.tree import decode
from trainfleet.errors import CheckpointError, StoreError
from trainfleet.store import FileStore, Store, open_store


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One checkpoint, as its manifest and indexes tell; its arrays are not read."""

    step: int
    order: int | None = None
    """The how manyeth commit of the store it is."""
    saved_at: float | None = None
    """Seconds since 1970 by the clock of rank 0."""
    world_size: int | None = None
    num_bytes: int | None = None
    """Of all its files."""
    metrics: Mapping[str, float] | None = None
    metadata: Mapping[str, Any] | None = None
    problem: str | None = None
    """Why it cannot be used, as far as that shows without reading the arrays."""


def open_place(place: str) -> tuple[Store, int | None]:
    """The store that a person means by `place`, and the step if that is the folder of one.

    A run folder, a folder of checkpoints, the folder of one step, or a store's URL. CheckpointError if there is none.
    """
    if "://" in place:
        return open_store(place), None
    path = Path(place).expanduser()
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {what}. Name a run folder, its folder of checkpoints, or the folder of one step."
        )
    if (step := step_of(path.resolve().name)) is not None:
        return FileStore(path.resolve().parent), step
    for folder in (path / "checkpoints", path):
        if _has_steps(folder):
            return FileStore(folder), None
    raise CheckpointError(f"There are no checkpoints in {path}, nor in a folder `checkpoints` there.")


def _has_steps(folder: Path) -> bool:
    """Looked for here, as a store would walk through everything below, which could be a whole disk."""
    return folder.is_dir() and any(step_of(entry.name) is not None for entry in folder.iterdir())


def catalog(store: Store) -> list[Entry]:
    """All checkpoints, by step, also unfinished and damaged ones."""
    return [describe(store, step) for step in sorted(steps_and_files(store.names()))]


def describe(store: Store, step: int) -> Entry:
    """One checkpoint, or why it is none."""
    try:
        manifest = read_manifest(store, step)
        indexes = read_indexes(store, manifest)
        files = [*manifest.indexes, *manifest.files]
        return Entry(
            step=step,
            order=manifest.order,
            saved_at=manifest.saved_at or None,
            world_size=manifest.attempt.world_size,
            num_bytes=sum(file.num_bytes for file in files) + sum(index.data_bytes for index in indexes),
            metrics=manifest.metrics,
            metadata=decode(manifest.metadata, "metadata"),
            problem=_missing_files(store, step, manifest, indexes),
        )
    except (Damaged, CheckpointError, StoreError) as error:
        return Entry(step=step, problem="; ".join(str(error).split("\n")))


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How one checkpoint fared when every byte of it was read."""

    step: int
    state: Literal["whole", "damaged", "unfinished", "unreadable"]
    """Unfinished: a save was killed there, or is under way. Unreadable: this version cannot tell."""
    problems: tuple[str, ...] = ()
    """By file and array."""
    surplus: tuple[str, ...] = ()
    """Files that are not part of it, and harm nothing."""


def examine(store: Store, step: int, tell: Callable[[int], None] = lambda num_bytes: None) -> Verdict:
    """Read all of a checkpoint and compare digests. `tell` hears of the bytes as they are read."""
    try:
        manifest = read_manifest(store, step)
    except CheckpointError as error:
        return Verdict(step=step, state="unreadable", problems=(str(error),))
    except (Damaged, StoreError) as error:
        state: Literal["unfinished", "damaged"] = "damaged" if store.exists(manifest_of(step)) else "unfinished"
        return Verdict(step=step, state=state, problems=(str(error),))
    problems = []
    try:
        verify_shards(store, read_indexes(store, manifest), tell)
    except CheckpointError as error:
        problems.append(str(error))
    except Damaged as error:
        problems += str(error).split("\n")
    problems += verify_further(store, manifest.files)
    if problems and not store.exists(manifest_of(step)):
        return Verdict(step=step, state="unfinished", problems=("it was removed while it was read",))
    surplus = tuple(surplus_files(store, step))
    return Verdict(step=step, state="damaged" if problems else "whole", problems=tuple(problems), surplus=surplus)


def _missing_files(store: Store, step: int, manifest: Manifest, indexes: list[Index]) -> str | None:
    there = set(store.names(folder_of(step) + "/"))
    wanted = [*(file.name for file in manifest.files), *(index.data_name for index in indexes)]
    missing = [name for name in wanted if name not in there]
    return f"{', '.join(missing)}: missing" if missing else None


def steps_in(store: Store, step: int | None) -> list[int]:
    """All steps, or only `step`; CheckpointError if there is none, or not that one."""
    steps = sorted(steps_and_files(store.names()))
    if not steps:
        raise CheckpointError(f"There are no checkpoints in {store!r}.")
    if step not in (None, *steps):
        has = ", ".join(map(str, steps))
        raise CheckpointError(f"There is no checkpoint of step {step} in {store!r}; its steps are {has}.")
    return steps if step is None else [step]


def read_step(store: Store, step: int | None) -> tuple[Manifest, list[Index]]:
    """Manifest and indexes of a step, of the newest commit if it is None; CheckpointError if they cannot be read."""
    if step is None:
        committed = [entry for entry in catalog(store) if entry.order is not None and entry.problem is None]
        if not committed:
            raise CheckpointError(f"There is no whole checkpoint in {store!r}.")
        step = max(committed, key=lambda entry: entry.order or 0).step
    steps_in(store, step)
    try:
        manifest = read_manifest(store, step)
        return manifest, read_indexes(store, manifest)
    except Damaged as error:
        raise CheckpointError(f"{folder_of(step)} in {store!r} cannot be used: {error}") from error
