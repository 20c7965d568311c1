"""Rollbacks: the way back to before an anomaly, a bounded number of times."""

from __future__ import annotations

from collections.abc import Mapping

from trainfleet.checkpoint import Rollback
from trainfleet.errors import TrainfleetError
from trainfleet.state import Stateful


class Rollbacks:
    """Copies of states in memory; going back to one leaves out the batches in between, for the stream goes on."""

    def __init__(self, states: Mapping[str, Stateful], *, most: int) -> None:
        """`most` in a row that bring the run no further."""
        self._rollback = Rollback(**states)
        self._most = most
        self._furthest = 0
        self._in_a_row = 0

    def remember(self, step: int) -> None:
        """Copy the states, to come back to."""
        self._rollback.take(step)

    def go_back(self, step: int, what: str) -> int:
        """Put the states back as they were at the last copy; the step of that.

        TrainfleetError after `most` of them that brought the run no further.
        """
        self._in_a_row = self._in_a_row + 1 if step <= self._furthest else 1
        self._furthest = max(step, self._furthest)
        if self._in_a_row > self._most:
            raise TrainfleetError(
                f"{what} in step {step}, and {self._most} rollbacks have brought the run no further.",
                hint="Lower the learning rate or train.clip_norm, look at the data of these steps, or raise "
                "train.max_rollbacks.",
            )
        return self._rollback.restore()
