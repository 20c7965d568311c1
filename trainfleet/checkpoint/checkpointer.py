"""Checkpointer: saves Statefuls behind the loop, restores the newest checkpoint that verifies."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

from trainfleet.checkpoint.loading import Loading, refuse_misfits, verify_shards
from trainfleet.checkpoint.manifest import (
    Manifest,
    publish,
    read_indexes,
    read_manifest,
)
from trainfleet.checkpoint.names import DATA, MANIFEST, Attempt, folder_of, steps_and_files
from trainfleet.checkpoint.retention import Retention
from trainfleet.checkpoint.save import Save
from trainfleet.checkpoint.sealed import Damaged
from trainfleet.checkpoint.shard import write_shard
from trainfleet.checkpoint.staging import StagedShard, StagingMemory, stage, state_of
from trainfleet.checkpoint.tidy import abandon, clear_leftovers, prune
from trainfleet.checkpoint.tree import decode, encode
from trainfleet.comm.group import DEADLINE, Group
from trainfleet.errors import CheckpointError, StoreError
from trainfleet.state import Stateful
from trainfleet.store import FileStore, Store

logger = logging.getLogger(__name__)


class Checkpointer:
    """Checkpoints in one Store, by step. Every rank has one and makes the same calls in the same order.

        checkpointer = Checkpointer(FileStore("runs/a/checkpoints"), group=mesh.world)
        start = checkpointer.restore(model=model, optimizer=optimizer) or 0
        ...
        checkpointer.save(step, model=model, optimizer=optimizer)
        ...
        checkpointer.close()

    Without `group` there is one rank. `timeout` is how long rank 0 waits for the shards of the others.
    """

    def __init__(
        self,
        store: Store,
        *,
        retention: Retention | None = None,
        group: Group | None = None,
        timeout: timedelta = DEADLINE,
    ) -> None:
        self._store = store
        self._retention = retention or Retention()
        self._group = group
        self._rank = group.rank if group else 0
        self._world_size = group.size if group else 1
        self._timeout = timeout
        self._memory = StagingMemory()
        self._run: str | None = None  # agreed by the ranks at the first save
        self._saves = 0
        self._save: Save | None = None
        self.problems: list[str] = []
        """What the last `restore` found wrong or odd: damaged files, by name; values that were not restored."""

    # saving

    def save(self, step: int, *, metadata: Mapping[str, Any] | None = None, **statefuls: Stateful) -> Save:
        """Copy the states; write and commit them behind the loop. The arrays may change as soon as this returns.

        How it ends is in the `Save` returned. CheckpointError here: a state cannot be stored, or the save before
        is not done within the deadline. Whatever fails, older checkpoints stand and nothing half-written counts.
        """
        begun = time.monotonic()
        if step < 0:
            raise CheckpointError(f"Step {step} cannot be saved; steps are counted from 0.")
        self._saves += 1
        attempt = Attempt(step=step, run=self._agree_on_run(), number=self._saves, world_size=self._world_size)
        described = encode(dict(metadata or {}), "metadata", _refuse_array)
        try:
            self._await_previous()
            staged = stage(statefuls, self._memory, rank=self._rank)
        except CheckpointError as error:
            abandon(self._store, attempt, self._rank, str(error))
            raise

        def write() -> None:
            self._write(attempt, staged, described)

        blocked = timedelta(seconds=time.monotonic() - begun)
        self._save = Save(
            step, self.place(step), write, num_bytes=staged.num_bytes, blocked=blocked, timeout=2 * self._timeout
        )
        return self._save

    def _agree_on_run(self) -> str:
        if self._run is None:
            mine = secrets.token_hex(6)
            self._run = str(self._group.exchange(mine)[0]) if self._group else mine
        return self._run

    def _await_previous(self) -> None:
        """The staging memory is free again when this returns."""
        previous = self._save
        if previous is None:
            return
        try:
            unreported = not previous.was_reported
            previous.wait(self._timeout)
        except CheckpointError as error:
            if not previous.done:
                raise
            if unreported:
                logger.error("%s", error)  # nobody asked how it ended, and nobody will now

    def _write(self, attempt: Attempt, staged: StagedShard, metadata: Mapping[str, Any]) -> None:
        """Behind the loop: write, and on rank 0 publish and tidy."""
        try:
            if self._rank == 0:
                _tolerate(lambda: clear_leftovers(self._store, attempt), "clear what unfinished saves left")
            write_shard(self._store, attempt, self._rank, staged)
            if self._rank == 0:
                publish(self._store, attempt, metadata, self._timeout)
        except Exception as error:
            abandon(self._store, attempt, self._rank, str(error))
            raise
        if self._rank == 0:
            _tolerate(lambda: prune(self._store, self._retention), "remove old checkpoints")
            _tolerate(lambda: clear_leftovers(self._store, attempt), "clear what replaced saves left")

    def wait(self, timeout: timedelta | None = None) -> None:
        """Return when the save under way, if any, is done; CheckpointError if it failed."""
        if self._save is not None:
            self._save.wait(timeout)

    def close(self) -> None:
        """Wait for the save under way; CheckpointError if it failed and nobody was told."""
        save, self._save = self._save, None
        if save is not None and not save.was_reported:
            save.wait()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except CheckpointError as failed:
            logger.error("%s", failed)  # beside the error that is under way already

    # restoring

    def restore(self, step: int | None = None, *, partial: bool = False, **statefuls: Stateful) -> int | None:
        """Load the newest checkpoint that verifies on all ranks, or that of `step`; its step, None if there is none.

        Damaged ones are passed over and named in `problems` and a warning. CheckpointError, with all states left
        as they were: every checkpoint is damaged, or `step` is; or the checkpoint does not fit: something is missing,
        surplus, of another shape or dtype. `partial` allows the checkpoint to hold further states. A mapping, list
        or None that is empty in the live state takes whatever is stored there.
        """
        if self._save is not None:
            self._save.settle()  # what it commits is to be seen; how it ended stays with it
        self.problems = []
        templates = {name: state_of(name, stateful) for name, stateful in statefuls.items()}
        candidates = [step] if step is not None else self._candidates()
        for candidate in candidates:
            if self._restore_one(candidate, templates, statefuls, partial):
                return int(candidate)
        if step is not None:
            raise CheckpointError(f"{self.place(step)} is not whole: {self._first_problems()}.")
        if candidates or self._exchange(self._rank == 0 and self.has_checkpoint())[0]:
            raise CheckpointError(
                f"Of the checkpoints in {self._store!r} none is whole: {self._first_problems()}.",
                hint="Repair or move them, or begin anew in another folder.",
            )
        return None

    def _candidates(self) -> list[int]:
        """Steps to try, newest commit first, as rank 0 sees them."""
        found: list[Manifest] = []
        problems: list[str] = []
        failure: str | None = None
        try:
            for step in steps_and_files(self._store.names()) if self._rank == 0 else ():
                try:
                    found.append(read_manifest(self._store, step))
                except (Damaged, StoreError) as error:
                    problems.append(str(error))
        except (CheckpointError, StoreError) as error:
            failure = str(error)
        found.sort(key=lambda manifest: manifest.order, reverse=True)
        seen = self._exchange({"steps": [m.step for m in found], "problems": problems, "failure": failure})[0]
        if seen["failure"]:
            raise CheckpointError(f"Nothing was restored: {seen['failure']}")
        for problem in seen["problems"]:
            self._note(problem)
        return [int(step) for step in seen["steps"]]

    def _restore_one(
        self, step: int, templates: Mapping[str, Any], statefuls: Mapping[str, Stateful], partial: bool
    ) -> bool:
        """Plan and read on this rank, hear how the others fared, and apply only if all fared well."""
        loading: Loading | None = None
        failure: Exception | None = None
        verdict: dict[str, Any] = {"damage": [], "wrong": [], "surplus": [], "failure": None}
        try:
            manifest = read_manifest(self._store, step)
            loading = Loading(read_indexes(self._store, manifest), self._rank)
            loading.plan(templates, partial=partial)
            verdict |= {"wrong": loading.misfits.wrong, "surplus": loading.misfits.surplus}
            if not loading.misfits.wrong:
                loading.read(self._store, world_size=self._world_size)
        except (Damaged, StoreError) as error:
            verdict["damage"] = str(error).split("\n")
        except Exception as error:  # a rank that leaves here would leave the others waiting
            failure = error
            verdict["failure"] = f"{type(error).__name__}: {error}"
        verdicts = self._exchange(verdict)
        if failure is not None:
            raise failure
        for rank, other in enumerate(verdicts):
            if other["failure"]:
                raise CheckpointError(f"{self.place(step)} was not restored: rank {rank} failed: {other['failure']}")
        damage = sorted({text for other in verdicts for text in other["damage"]})
        if damage:
            for text in damage:
                self._note(text)
            return False
        surplus = set.intersection(*(set(other["surplus"]) for other in verdicts))
        wrong = {text: None for other in verdicts for text in other["wrong"]}
        refuse_misfits(list(wrong), sorted(surplus), self.place(step))
        assert loading is not None
        loading.apply(statefuls)
        self._note_remarks(step, loading.misfits.kept)
        return True

    def _note_remarks(self, step: int, kept: list[str]) -> None:
        if kept:
            self._note(
                f"{', '.join(kept)}: not stored for rank {self._rank}, because {folder_of(step)} was saved by fewer "
                "ranks; left as it is"
            )
        if self._rank == 0:
            for name in self._surplus_files(step):
                self._note(f"{name}: not part of the checkpoint, and not read")

    def _surplus_files(self, step: int) -> list[str]:
        manifest = read_manifest(self._store, step)
        listed = {f"{folder_of(step)}/{MANIFEST}"}
        for index in manifest.indexes:
            listed |= {index.name, index.name.removesuffix(".json") + DATA}
        return [name for name in self._store.names(folder_of(step) + "/") if name not in listed]

    def _note(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
            logger.log(logging.DEBUG if self._rank else logging.WARNING, "Checkpoint: %s.", problem)

    def _first_problems(self) -> str:
        more = len(self.problems) - 5
        return "; ".join(self.problems[:5]) + (f"; and {more} more" if more > 0 else "")

    def _exchange(self, value: Any) -> list[Any]:
        return self._group.exchange(value) if self._group else [value]

    # looking

    def steps(self) -> list[int]:
        """The steps that were committed, ascending; whether they are whole, `verify` tells."""
        return sorted(step for step, files in steps_and_files(self._store.names()).items() if MANIFEST in files)

    def has_checkpoint(self) -> bool:
        return bool(self.steps())

    def read_metadata(self, step: int) -> dict[str, Any]:
        """What was given to `save` as metadata."""
        try:
            metadata: dict[str, Any] = decode(read_manifest(self._store, step).metadata, "metadata")
        except Damaged as error:
            raise CheckpointError(f"{self.place(step)} is not whole: {error}.") from error
        return metadata

    def verify(self, step: int) -> list[str]:
        """Read all of a checkpoint, on this rank alone; what is damaged or surplus, by file. [] if it is whole."""
        try:
            manifest = read_manifest(self._store, step)
            verify_shards(self._store, read_indexes(self._store, manifest))
        except Damaged as error:
            return str(error).split("\n")
        return [f"{name}: not part of the checkpoint" for name in self._surplus_files(step)]

    def place(self, step: int) -> str:
        """Where a step is, in words for a person."""
        if isinstance(self._store, FileStore):
            return str(self._store.path_of(folder_of(step)))
        return f"{folder_of(step)} in {self._store!r}"


def _refuse_array(array: Any) -> None:
    raise CheckpointError(f"{array.path} is an array; metadata holds strings, numbers and lists and dicts of them.")


def _tolerate(tidy: Callable[[], object], what: str) -> None:
    """Tidying that fails is told, and spoils nothing."""
    try:
        tidy()
    except StoreError as error:
        logger.warning("Could not %s: %s", what, error)
