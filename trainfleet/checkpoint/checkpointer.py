"""Checkpointer: saves Statefuls behind the loop, restores the newest checkpoint that verifies."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, get_args

from trainfleet.checkpoint.catalog import examine
from trainfleet.checkpoint.further import SaveFunction
from trainfleet.checkpoint.memory import StagingMemory
from trainfleet.checkpoint.names import MANIFEST, Attempt, folder_of, steps_and_files
from trainfleet.checkpoint.order import Order, carry_out
from trainfleet.checkpoint.restore import Restore, read_metadata
from trainfleet.checkpoint.retention import Retention
from trainfleet.checkpoint.save import Save
from trainfleet.checkpoint.settings import Export
from trainfleet.checkpoint.staging import reserve, stage
from trainfleet.checkpoint.tidy import abandon, is_done, remove_checkpoint
from trainfleet.checkpoint.tree import encode
from trainfleet.checkpoint.writer import CAN_RUN, Writer, WriterLost
from trainfleet.comm.group import DEADLINE, Group
from trainfleet.errors import CheckpointError, ConfigError, StoreError
from trainfleet.state import Stateful
from trainfleet.store import FileStore, Hold, Store

logger = logging.getLogger(__name__)


class Checkpointer:
    """Checkpoints in one Store, by step. Every rank has one and makes the same calls in the same order.

        checkpointer = Checkpointer(FileStore("runs/a/checkpoints"), group=mesh.world)
        start = checkpointer.restore(model=model, optimizer=optimizer) or 0
        ...
        checkpointer.save(step, model=model, optimizer=optimizer)
        ...
        checkpointer.close()

    Without `group` there is one rank. `timeout` is how long rank 0 waits for the shards of the others. From the first
    `hold`, `prepare` or `save` on until `close` the store is this run's alone.

    `export` writes the model as one safetensors file with each checkpoint. `save_function(state, step, path)` writes
    what else is wanted, in the process of rank 0. Both are committed and removed together with the checkpoint.

    A process of its own does the writing, where other processes can reach the store; with a `save_function`, or where
    the system has no such processes (not Linux), it is a thread.
    """

    def __init__(
        self,
        store: Store,
        *,
        retention: Retention | None = None,
        group: Group | None = None,
        timeout: timedelta = DEADLINE,
        export: Export | None = None,
        save_function: SaveFunction | None = None,
    ) -> None:
        if export is not None and export not in get_args(Export):
            known = " or ".join(map(repr, get_args(Export)))
            raise ConfigError(f"export is {export!r}; use {known}, or None for no export.")
        self._store = store
        self._retention = retention or Retention()
        self._group = group
        self._rank = group.rank if group else 0
        self._world_size = group.size if group else 1
        self._timeout = timeout
        self._export = export
        self._save_function = save_function
        address = store.address if CAN_RUN and save_function is None else None
        self._writer = Writer(address) if address is not None else None
        self._memory = StagingMemory(shared=self._writer is not None)
        self._hold: Hold | None = None
        self._run: str | None = None  # agreed by the ranks at the first save
        self._saves = 0
        self._distrusted: set[int] = set()  # steps in which damage was found
        self._save: Save | None = None
        self.problems: list[str] = []
        """What the last `restore` found wrong or odd: damaged files, by name; values that were not restored."""

    # saving

    def hold(self) -> None:
        """Take the store for this run, on rank 0; StoreError if another run has it, and whose that is."""
        if self._rank == 0 and self._hold is None:
            self._hold = self._store.hold()

    def prepare(self, **statefuls: Stateful) -> None:
        """Get memory and writer for saves of these states now, so that the first save costs no more than the others."""
        self._await_previous()
        self.hold()
        reserve(statefuls, self._memory, rank=self._rank)
        self._start_writer()

    def save(
        self,
        step: int,
        *,
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        **statefuls: Stateful,
    ) -> Save:
        """Copy the states; write and commit them behind the loop. The arrays may change as soon as this returns.

        `metrics` are what was measured at this step: the retention keeps the best by one of them.

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
            self.hold()
            staged = stage(statefuls, self._memory, rank=self._rank)
            self._start_writer()
        except (CheckpointError, StoreError) as error:
            abandon(self._store, attempt, self._rank, str(error))
            raise
        self._distrusted.discard(step)  # what is saved there now is another
        order = Order(
            attempt=attempt,
            rank=self._rank,
            staged=staged,
            metadata=described,
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            retention=self._retention,
            timeout=self._timeout,
            export=self._export,
            distrusted=tuple(self._distrusted),
        )
        blocked = timedelta(seconds=time.monotonic() - begun)
        self._save = Save(
            step,
            self.place(step),
            lambda: self._write(order),
            num_bytes=staged.num_bytes,
            blocked=blocked,
            timeout=2 * self._timeout,
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

    def _start_writer(self) -> None:
        if self._writer is not None:
            self._writer.start(self._hold.descriptor if self._hold else None)

    def _write(self, order: Order) -> None:
        """Behind the loop."""
        if self._writer is None:
            carry_out(self._store, order, self._save_function)
            return
        try:
            self._writer.write(order, self._memory, 2 * self._timeout)
        except WriterLost as error:
            if is_done(self._store, order.attempt, self._rank):
                logger.warning("All is stored, but the writer was lost after that: %s", error)
                return
            abandon(self._store, order.attempt, self._rank, str(error))
            raise

    def wait(self, timeout: timedelta | None = None) -> None:
        """Return when the save under way, if any, is done; CheckpointError if it failed."""
        if self._save is not None:
            self._save.wait(timeout)

    def close(self) -> None:
        """Wait for the save under way; end the writer and let go of the store.

        CheckpointError if that save failed and nobody was told.
        """
        save, self._save = self._save, None
        try:
            if save is not None and not save.was_reported:
                save.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
            self._memory.close()
            hold, self._hold = self._hold, None
            if hold is not None:
                hold.close()

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

    def reset(self) -> None:
        """Remove every checkpoint of the store. Nothing else ever does; all ranks call it."""
        if self._save is not None:
            self._save.settle()
        failure: str | None = None
        try:
            self.hold()
            if self._rank == 0:
                for step, files in steps_and_files(self._store.names()).items():
                    remove_checkpoint(self._store, step, [file for file in files if file != MANIFEST])
        except StoreError as error:
            failure = str(error)
        if self._group is not None:
            failure = self._group.exchange(failure)[0]
        if failure is not None:
            raise CheckpointError(f"The checkpoints could not be removed: {failure}")

    # restoring

    def restore(
        self, step: int | None = None, *, partial: bool = False, cast: bool = False, **statefuls: Stateful
    ) -> int | None:
        """Load the newest checkpoint that verifies on all ranks, or that of `step`; its step, None if there is none.

        Damaged ones are passed over and named in `problems` and a warning. CheckpointError, with all states left
        as they were: every checkpoint is damaged, or `step` is; or the checkpoint does not fit: something is missing,
        surplus, of another shape or dtype. `partial` allows the checkpoint to hold further states, `cast` floats of
        another dtype, which are rounded. A mapping, list or None that is empty in the live state takes whatever is
        stored there.
        """
        if self._save is not None:
            self._save.settle()  # what it commits is to be seen; how it ended stays with it
        restore = Restore(self._store, self._group, self.place, partial=partial, cast=cast)
        self.problems = restore.problems
        try:
            return restore.run(step, statefuls)
        finally:
            self._distrusted.update(restore.damaged)

    # looking

    def steps(self) -> list[int]:
        """The steps that were committed, ascending; whether they are whole, `verify` tells."""
        return sorted(step for step, files in steps_and_files(self._store.names()).items() if MANIFEST in files)

    def has_checkpoint(self) -> bool:
        return bool(self.steps())

    def read_metadata(self, step: int) -> dict[str, Any]:
        """What was given to `save` as metadata."""
        return read_metadata(self._store, step)

    def verify(self, step: int) -> list[str]:
        """Read all of a checkpoint, on this rank alone; what is damaged or surplus, by file. [] if it is whole.

        CheckpointError where a newer version wrote it.
        """
        verdict = examine(self._store, step)
        if verdict.state == "unreadable":
            raise CheckpointError(verdict.problems[0])
        if verdict.problems:
            self._distrusted.add(step)
        return [*verdict.problems, *(f"{name}: not part of the checkpoint" for name in verdict.surplus)]

    def place(self, step: int) -> str:
        """Where a step is, in words for a person."""
        if isinstance(self._store, FileStore):
            return str(self._store.path_of(folder_of(step)))
        return f"{folder_of(step)} in {self._store!r}"


def _refuse_array(array: Any) -> None:
    raise CheckpointError(f"{array.path} is an array; metadata holds strings, numbers and lists and dicts of them.")
