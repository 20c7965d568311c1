"""A save under way: what the loop holds while a thread of its own writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from trainfleet.errors import CheckpointError, TrainfleetError


class Save:
    """One rank's part in saving one step. It is done, well or not, when `done` is true.

    On rank 0 done means committed: the manifest stands. On the others it means that their shard is stored.
    """

    def __init__(
        self,
        step: int,
        path: str,
        write: Callable[[], None],
        *,
        num_bytes: int,
        blocked: timedelta,
        timeout: timedelta,
    ) -> None:
        self.step = step
        self.path = path
        self.num_bytes = num_bytes
        """Array bytes that this rank stores."""
        self.blocked = blocked
        """How long the loop waited for `save`: for the save before this one, and for the copy."""
        self.took: timedelta | None = None
        """From the copy to the commit, once done."""
        self._timeout = timeout
        self.was_reported = False
        """Whether anybody has asked how it ended."""
        self._error: CheckpointError | None = None
        self._write: Callable[[], None] | None = write
        # A daemon, so that a save never keeps a dying process alive; whoever wants it committed waits for it.
        self._thread = threading.Thread(target=self._run, name=f"save-{step}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        begun = time.monotonic()
        # What it holds must not outlive it: whoever keeps this Save would keep the Checkpointer and its writer.
        write, self._write = self._write, None
        assert write is not None
        try:
            write()
        except CheckpointError as error:
            self._error = error
        except Exception as error:
            hint = error.hint if isinstance(error, TrainfleetError) else None
            self._error = CheckpointError(f"Step {self.step} was not saved: {error}", hint=hint)
            self._error.__cause__ = error
        self.took = timedelta(seconds=time.monotonic() - begun)

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    @property
    def error(self) -> CheckpointError | None:
        """Why it failed; None while under way, and when all went well."""
        if not self.done:
            return None
        self.was_reported = True
        return self._error

    def settle(self, timeout: timedelta | None = None) -> None:
        """Return when it is done, well or not, or after `timeout`; nobody is told how it ended."""
        self._thread.join((timeout or self._timeout).total_seconds())

    def wait(self, timeout: timedelta | None = None) -> None:
        """Return when it is done; CheckpointError if it failed, or is not done in time.

        `timeout` is twice that of the Checkpointer if not given: once to write, once for rank 0 to wait for others.
        """
        timeout = self._timeout if timeout is None else timeout
        self.settle(timeout)
        if not self.done:
            raise CheckpointError(
                f"The save of step {self.step} to {self.path} is not done after {timeout.total_seconds():.0f} s. "
                "See whether the disk is slow or hangs; it goes on and may still be committed."
            )
        if self.error is not None:
            raise self.error
