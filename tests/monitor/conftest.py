"""Events as a run would emit them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from trainfleet.events import Evaluated, Event, Noted, RunEnded, RunStarted, StepEnded, Tracked


class Story:
    """Writes the events of a small run."""

    def started(self, **fields: Any) -> RunStarted:
        known = {
            "folder": "runs/small",
            "steps": 40,
            "start_step": 0,
            "world_size": 2,
            "parameters": 1_234_567,
            "plan": "zero=2 dp_shard=2 fp32",
            "recipe": {"train": {"steps": 40}},
        }
        return RunStarted(**{**known, **fields})

    def step(self, step: int, **fields: Any) -> StepEnded:
        known = {
            "loss": 1.5 + 4 * math.exp(-step / 10),
            "learning_rate": 3e-4,
            "grad_norm": 0.5,
            "samples": 8,
            "tokens": 1024,
            "seconds": 0.1,
            "data_seconds": 0.001,
            "memory_bytes": 412_000_000,
        }
        return StepEnded(step=step, **{**known, **fields})

    def run(self, first: int = 1, last: int = 40) -> Iterator[Event]:
        yield self.started(start_step=first - 1)
        yield Tracked(step=first - 1, name="baseline/unigram", value=3.29)
        for step in range(first, last + 1):
            yield self.step(step)
            if step % 10 == 0:
                yield Evaluated(step=step, loss=1.6 + 4 * math.exp(-step / 10), metrics={"accuracy": step / 100})
        yield Noted(step=last, title="generated", text="def f():\n    return 1")
        yield RunEnded(
            step=last, reason="finished", seconds=4.2, summary={"validation loss": 1.67, "baseline/trigram": 1.87}
        )


@pytest.fixture
def story() -> Story:
    return Story()
