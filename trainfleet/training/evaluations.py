"""Evaluations: passes over held-out data, and what early stopping makes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

from trainfleet.batch import Batch
from trainfleet.comm.group import Group
from trainfleet.errors import ConfigError
from trainfleet.events import Evaluated
from trainfleet.parallel import Ema, Engine
from trainfleet.stopwatch import timed
from trainfleet.tracks import Tracks, reduced


class Evaluations:
    """Those of a run. Without `passes`, which gives the batches of one pass at each call, there are none."""

    def __init__(
        self,
        passes: Callable[[], Iterable[Batch]] | None,
        *,
        patience: int | None,
        world: Group,
        new_tracks: Callable[[], Tracks],
    ) -> None:
        """`patience` is how many without a smaller loss are enough; None: never."""
        self.passes = passes
        self.last: float | None = None
        """The loss of the last one."""
        self._step = -1  # of the last one
        self._patience = patience
        self._world, self._new_tracks = world, new_tracks
        self._best: float | None = None
        self._without_gain = 0

    def run(self, engine: Engine, ema: Ema | None, step: int) -> Evaluated:
        """The mean loss over a pass, of the averaged weights if there is an average; a collective.

        What is tracked in it, such as by the loss function, becomes its metrics.
        """
        if self.passes is None:
            raise ConfigError("There is nothing to evaluate on; give the Trainer `evaluation`.")
        begun = time.perf_counter()
        averaged = ema.applied() if ema is not None else nullcontext()
        with timed("evaluation"), averaged, self._new_tracks() as tracks:
            loss = engine.evaluate(self.passes())
            tracked = reduced(self._world.exchange(tracks.take()))
        self.last, self._step = loss.mean, step
        metrics = {name: value for name, (_, value) in tracked.items()}
        return Evaluated(step=step, loss=loss.mean, metrics=metrics, seconds=time.perf_counter() - begun)

    def is_enough(self, loss: float) -> bool:
        """Count an evaluation; True where so many have brought no gain that the run may stop."""
        if self._best is None or loss < self._best:
            self._best, self._without_gain = loss, 0
            return False
        self._without_gain += 1
        return self._patience is not None and self._without_gain >= self._patience

    def metrics_at(self, step: int) -> dict[str, float]:
        """What was measured at this very step."""
        return {"loss": self.last} if self.last is not None and self._step == step else {}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "evaluations_without_gain": self._without_gain}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self._best = state["best"]
        self._without_gain = int(state["evaluations_without_gain"])
