"""Turns: where the loop of a whole recipe stands still while others have their turn, and what its own blocks took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from trainfleet.loss import LossSum

BREAKS: set[int] = set()
"""The steps, counted from 0, before which the others have their turn."""
between: Callable[[], None] = lambda: None  # noqa: E731
"""That turn; it is not timed."""
blocks: list[float] = []
"""Seconds of each block, from one break to the next."""
_begun: list[float] = []


def step(engine: Any, micro_batches: Sequence[Any]) -> LossSum:
    """For `train.step_fn`: as the engine's own step, after the turn of the others where it is due."""
    if engine.steps in BREAKS:
        if _begun:
            blocks.append(time.perf_counter() - _begun.pop())
        between()
        _begun.append(time.perf_counter())
    return engine.forward_backward(micro_batches)  # type: ignore[no-any-return]
