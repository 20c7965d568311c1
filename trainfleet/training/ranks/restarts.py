"""Restarts: whether ranks that failed are started again, and how soon."""

from __future__ import annotations

from trainfleet.errors import AnomalyStopped
from trainfleet.training.ranks.failure import Failure

LONGEST_PAUSE_SECONDS = 30.0


class NotAgain(Exception):
    """Another start would do no better; `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.sentence)
        self.failure = failure


class Restarts:
    """What one launcher remembers of the starts before.

    A run that took a step since its last start goes on at once. One that did not is given pauses of 1, 2, 4, ... up
    to 30 seconds, for what is in its way may need time: memory that is not yet free, a file server that comes back.
    """

    def __init__(self) -> None:
        self._last: Failure | None = None
        self._without_a_step = 0

    def after(self, failure: Failure | None, *, took_steps: bool) -> float:
        """Seconds to wait before the next start; NotAgain where that would meet the same error, or nobody wants it.

        `failure` is None where these ranks fell only because others had, perhaps on another host.
        """
        if failure is not None and failure.exit_code == AnomalyStopped.exit_code:
            raise NotAgain(failure)
        if failure is not None and not failure.from_outside:
            if self._last is not None and failure.is_like(self._last):
                raise NotAgain(failure.as_repeated())
            self._last = failure
        self._without_a_step = 0 if took_steps else self._without_a_step + 1
        if self._without_a_step < 2:
            return 0.0
        return min(2.0 ** (self._without_a_step - 2), LONGEST_PAUSE_SECONDS)
