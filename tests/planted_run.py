"""Runs that were never made: folders with the events that such a run would have written, to plant troubles in."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trainfleet.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    RanksReported,
    RunEnded,
    RunStarted,
    StepEnded,
)
from trainfleet.monitor.jsonl import to_json
from trainfleet.stopwatch import PHASES

BEGAN = 1_795_000_000.0
STEP_SECONDS = 0.2
RECIPE: dict[str, Any] = {
    "data": {"source": "numpy", "workers": 2, "prefetch": 2},
    "batch": {"global_batch": 16, "micro_batch": 4, "accumulation": None},
    "plan": {"zero": 2, "precision": "fp32", "recompute": "none"},
    "optimizer": {"name": "adamw", "lr": 3e-3},
    "schedule": {"name": "cosine", "warmup_steps": 20},
    "train": {"steps": 400, "clip_norm": 1.0, "evaluate_every": 100},
    "checkpoint": {"every": 100, "keep_last": 3},
    "monitor": {"log_interval": 10},
}
HEALTHY = {"data": 0.002, "forward": 0.06, "backward": 0.1, "communication": 0.02, "optimizer": 0.01, "other": 0.002}


def recipe(**sections: dict[str, Any]) -> dict[str, Any]:
    """That of a healthy run, with some settings of some sections changed."""
    return {name: {**RECIPE.get(name, {}), **sections.get(name, {})} for name in {**RECIPE, **sections}}


def step(number: int, *, steps: int = 400, **changed: Any) -> StepEnded:
    """One of a healthy run: the loss falls, the rate warms up, the phases are where they belong."""
    noise = random.Random(number)
    phases = {**dict.fromkeys(PHASES, 0.0), **changed.pop("phases", HEALTHY)}
    usual: dict[str, Any] = {
        "loss": 1.5 + 4.0 * 0.99**number + noise.gauss(0, 0.05),
        "learning_rate": 3e-3 * min(1.0, number / 20) * (1 - 0.9 * number / steps),
        "grad_norm": 0.8 + noise.uniform(0, 0.4),
        "samples": 16,
        "tokens": 4096,
        "between_seconds": 0.0,
        "phases": phases,
        "data_seconds": phases["data"],
        "waits": {"transform": phases["data"]},
        "memory_bytes": 400_000_000 + noise.randrange(1_000_000),
    }
    usual |= changed
    seconds = changed.get("seconds", sum(phases.values()) - usual["between_seconds"])
    return StepEnded(step=number, **{**usual, "seconds": seconds})


def started(*, start_step: int = 0, steps: int = 400, world_size: int = 2, **sections: dict[str, Any]) -> RunStarted:
    return RunStarted(
        folder="runs/planted",
        steps=steps,
        start_step=start_step,
        world_size=world_size,
        parameters=1_000_000,
        plan="zero=2",
        recipe=recipe(**sections),
    )


def ended(number: int = 400, reason: str = "finished") -> RunEnded:
    return RunEnded(step=number, reason=reason, seconds=number * STEP_SECONDS)


def report(number: int, *by_rank: dict[str, float], steps: int = 10) -> RanksReported:
    """What ranks tell: phases of these steps, of each; the whole is that of the slowest."""
    whole = max(sum(phases.values()) for phases in by_rank)
    ranks = [
        {"host": f"node-{rank}", "device": "cpu", "seconds": whole, "phases": phases, "memory_bytes": 1, "system": {}}
        for rank, phases in enumerate(by_rank)
    ]
    return RanksReported(step=number, steps=steps, ranks=ranks)


def healthy_events(
    change: Callable[[int], dict[str, Any]] = lambda number: {}, *, steps: int = 400, saved: bool = False
) -> list[Event]:
    """Evaluated each hundred steps, told by the ranks each ten; `change` gives other fields of a step.

    `saved`: with the events of saves, though there are no checkpoints.
    """
    ten = {phase: 10 * seconds for phase, seconds in HEALTHY.items()}
    events: list[Event] = []
    for number in range(1, steps + 1):
        events.append(step(number, steps=steps, **change(number)))
        if number % 10 == 0:
            events.append(report(number, ten, ten))
        if number % 100 == 0:
            events.append(Evaluated(step=number, loss=1.6 + 4.0 * 0.99**number, seconds=0.5))
            if saved:
                events.append(CheckpointSaved(step=number, path=f"step-{number}", seconds=0.01))
    return events


def write_run(
    folder: Path,
    events: Iterable[Event],
    *,
    device: str = "cpu",
    memory_bytes: int = 16_000_000_000,
    torn: bool = False,
) -> Path:
    """The folder of a run that had these events, a fifth of a second apart; `torn` cuts off its last line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [to_json(event, written_at=BEGAN + STEP_SECONDS * number) for number, event in enumerate(events)]
    text = "".join(line + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text[:-20] if torn else text)
    entry = {"world_size": 2, "device": device, "memory_bytes": memory_bytes}
    (folder / "environment.json").write_text(json.dumps([entry]))
    return folder
