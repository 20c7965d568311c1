"""Saves: the checkpoints of a run, from the first to the one at its end; how each ended is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainfleet.checkpoint import Checkpointer, Save
from trainfleet.comm.group import Group
from trainfleet.errors import CheckpointError, NotSaved, StoreError
from trainfleet.events import CheckpointFailed, CheckpointSaved, Event, Restored
from trainfleet.state import Stateful
from trainfleet.stopwatch import timed


class Saves:
    """Begins saves, and tells `emit` how they ended. A failed one does not stop the run."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        *,
        emit: Callable[[Event], None],
        metadata: Mapping[str, Any],
    ) -> None:
        self.checkpointer = checkpointer
        self.step: int | None = None
        """Of the last save that was begun, or of what was restored."""
        self._emit = emit
        self._metadata = metadata
        self.is_prepared = False
        """Whether the first save will find what it needs."""
        self._under_way: Save | None = None
        self._failed: CheckpointError | StoreError | None = None  # why the last save failed, if it did

    def prepare(self, states: Mapping[str, Stateful]) -> None:
        """When all `states` have their size: get what saves need, so that none of them waits."""
        self.is_prepared = True
        with timed("checkpoint"):
            try:
                self.checkpointer.prepare(**states)
            except (CheckpointError, StoreError) as exc:
                self._emit(CheckpointFailed(step=0, reason=str(exc)))

    def save(self, step: int, states: Mapping[str, Stateful], metrics: Mapping[str, float]) -> None:
        """Begin a checkpoint of `states`; `metrics` are what was measured at this very step."""
        with timed("checkpoint"):
            self._tell_the_end()
            try:
                self._under_way = self.checkpointer.save(step, metadata=self._metadata, metrics=metrics, **states)
            except (CheckpointError, StoreError) as exc:
                self._failed = exc
                self._emit(CheckpointFailed(step=step, reason=str(exc)))
        self.step = step

    def tell(self) -> None:
        """Tell how the save under way ended, if it has."""
        if self._under_way is not None and self._under_way.done:
            self._tell_the_end()

    def save_last(self, step: int, states: Mapping[str, Stateful], metrics: Mapping[str, float]) -> None:
        """Save where the run ends, unless that was done; returns when it has ended."""
        if self.step != step:
            self.save(step, states, metrics)
        with timed("checkpoint"):
            self._tell_the_end()

    def restore(self, states: Mapping[str, Stateful], *, cast: bool) -> int | None:
        """Go on with `states` from the newest whole checkpoint: its step, or None if there is none."""
        step = self.checkpointer.restore(None, partial=False, cast=cast, **states)
        if step is not None:
            self.step = step
            self._emit(Restored(step=step, path=self.checkpointer.place(step)))
        return step

    def reset(self) -> None:
        """Remove every checkpoint."""
        self._under_way, self.step = None, None
        self.checkpointer.reset()

    def refuse_unsaved_end(self, group: Group, step: int) -> None:
        """NotSaved, on all ranks alike, if any of them failed to save where the run ended."""
        failed = self._failed
        told = group.exchange(None if failed is None else [str(failed), failed.hint])
        failures = [each for each in told if each is not None]
        if failures:
            reason, hint = failures[0]
            raise NotSaved(
                f"The run ended after step {step}, but its last checkpoint failed: {reason.rstrip('.')}. "
                f"{self._newest()}",
                hint=hint,
            )

    def _newest(self) -> str:
        try:
            steps = self.checkpointer.steps()
        except StoreError as error:
            return f"Whether there is an older one cannot be seen: {error}"
        if not steps:
            return "There is no older one, so nothing of this run is saved."
        return f"The newest one is that of step {steps[-1]}, {self.checkpointer.place(steps[-1])}."

    def _tell_the_end(self) -> None:
        save, self._under_way = self._under_way, None
        if save is None:
            return
        try:
            save.wait()
        except CheckpointError as exc:
            self._failed = exc
            self._emit(CheckpointFailed(step=save.step, reason=str(exc)))
        else:
            self._failed = None
            self._emit(CheckpointSaved(step=save.step, path=save.path, seconds=save.blocked.total_seconds()))
