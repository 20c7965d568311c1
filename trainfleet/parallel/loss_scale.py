"""Loss scaling (Micikevicius et al., arXiv:1710.03740): the loss is multiplied so that fp16 gradients do not vanish."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainfleet.errors import TrainfleetError
from trainfleet.plan import LossScale


class LossScaler:
    """The scale now. It halves at an overflow and doubles after `window` steps without one."""

    def __init__(self, settings: LossScale) -> None:
        self._settings = settings
        self.scale = settings.initial
        self._steps_without_overflow = 0

    def update(self, *, overflow: bool) -> None:
        """Tell the outcome of a step; all ranks must tell the same.

        Raises TrainfleetError where the scale cannot fall any further: the gradients themselves overflow.
        """
        if overflow:
            self._steps_without_overflow = 0
            if self._settings.fixed:
                return
            if self.scale <= self._settings.minimum:
                raise TrainfleetError(
                    f"The fp16 gradients overflow even at the smallest loss scale, {self._settings.minimum:g}. "
                    "Lower the learning rate, clip the gradients (train.clip_norm), or use plan.precision=bf16."
                )
            self.scale = max(self.scale / 2, self._settings.minimum)
            return
        self._steps_without_overflow += 1
        if self._steps_without_overflow >= self._settings.window and not self._settings.fixed:
            self._steps_without_overflow = 0
            self.scale *= 2

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "steps_without_overflow": self._steps_without_overflow}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self.scale = float(state["scale"])
        self._steps_without_overflow = int(state["steps_without_overflow"])
