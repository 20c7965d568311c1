"""Anomalies: losses and gradients that must not be learned from, and the way back to before them."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping

from trainfleet.checkpoint import Rollback
from trainfleet.errors import TrainfleetError
from trainfleet.state import Stateful
from trainfleet.training.recipe import TrainConfig

_REMEMBERED = 50
_ENOUGH = 10  # losses before a jump can be told


class Anomalies:
    """Watches losses, which are the same on all ranks, so that all of them go back together."""

    def __init__(self, config: TrainConfig, states: Mapping[str, Stateful]) -> None:
        self._config = config
        self._rollback = Rollback(**states)
        self._losses: deque[float] = deque(maxlen=_REMEMBERED)
        self._furthest = 0
        self._in_a_row = 0

    def remember(self, step: int) -> None:
        """Copy the states, to come back to."""
        self._rollback.take(step)

    def seen_in(self, loss: float, norm: float, loss_scale: float | None) -> str | None:
        """What is wrong with a step before its update, in words; None if nothing is.

        Under fp16 a norm that is not finite is an overflow, which the loss scale deals with.
        """
        if not math.isfinite(loss):
            return f"The loss is {loss}"
        if loss_scale is None and not math.isfinite(norm):
            return f"The norm of the gradient is {norm}"
        spike = self._config.rollback_spike
        if spike is not None and len(self._losses) >= _ENOUGH:
            usual = statistics.median(self._losses)
            if loss > spike * usual > 0:
                return f"The loss is {loss:.4g}, {loss / usual:.1f} times the usual {usual:.4g}"
        self._losses.append(loss)
        return None

    def go_back(self, step: int, what: str) -> int:
        """Put the states back as they were at the last copy; the step of that.

        TrainfleetError after `max_rollbacks` of them that brought the run no further.
        """
        self._in_a_row = self._in_a_row + 1 if step <= self._furthest else 1
        self._furthest = max(step, self._furthest)
        if self._in_a_row > self._config.max_rollbacks:
            raise TrainfleetError(
                f"{what} in step {step}, and {self._config.max_rollbacks} rollbacks have brought the run no further.",
                hint="Lower the learning rate or train.clip_norm, look at the data of these steps, or raise "
                "train.max_rollbacks.",
            )
        return self._rollback.restore()
