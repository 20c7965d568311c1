"""Anomalies: losses and gradients that must not be learned from."""

from __future__ import annotations

import math
import statistics
from collections import deque

from trainfleet.training.recipe import TrainConfig
from trainfleet.training.watcher import Judgement, UnderWay, Watcher

_REMEMBERED = 50
_ENOUGH = 10  # losses before a jump can be told


class Anomalies(Watcher):
    """Watches losses, which are the same on all ranks, so that all of them judge alike."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=_REMEMBERED)

    def judge(self, under_way: UnderWay) -> Judgement | None:
        """Under fp16 a norm that is not finite is an overflow, which the loss scale deals with."""
        loss, norm = under_way.loss, under_way.grad_norm
        if not math.isfinite(loss):
            return Judgement(policy="rollback", kind="loss_not_finite", what=f"The loss is {loss}")
        if under_way.loss_scale is None and not math.isfinite(norm):
            return Judgement(policy="rollback", kind="gradient_not_finite", what=f"The norm of the gradient is {norm}")
        spike = self._config.rollback_spike
        if spike is not None and len(self._losses) >= _ENOUGH:
            usual = statistics.median(self._losses)
            if loss > spike * usual > 0:
                what = f"The loss is {loss:.4g}, {loss / usual:.1f} times the usual {usual:.4g}"
                return Judgement(policy="rollback", kind="loss_spike", what=what)
        self._losses.append(loss)
        return None
