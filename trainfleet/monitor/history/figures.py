"""A run in a few figures, and several of them beside one another: what differs, and who was where when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainfleet.monitor.history.goodput import UNDONE
from trainfleet.monitor.history.run import History

ABSENT = "(none)"
"""In place of a setting that one run has and another lacks."""
_MACHINE = ("python", "system", "host", "cpus", "device", "world_size", "packages")
"""What of an environment can change what a run computes, or how fast."""
_PARTS = 4
"""Equal steps and equal times are told at so many points."""


def figures(run: History) -> dict[str, float | int | str | None]:
    """Names with units; None where a figure is not known. Ready for JSON but for floats that are not finite."""
    start = run.starts[-1] if run.starts else None
    last = run.evaluations.last
    seconds = sum(group.seconds for group in run.steps.groups)
    waited = sum(group.data_seconds for group in run.steps.groups)
    memory = [run.steps.peak_bytes, *(rank.memory_bytes for rank in run.ranks.ranks)]
    return {
        "end": run.end,
        "steps": run.last_step,
        "planned_steps": start.steps if start else None,
        "loss": known(run.loss_at(run.last_step)),
        "validation_loss": last.loss if last else None,
        "best_validation_loss": run.best.loss if run.best else None,
        "best_step": run.best.step if run.best else None,
        "tokens_per_second": known(run.steps.tokens_per_second),
        "samples_per_second": known(run.steps.samples_per_second),
        "step_seconds": known(run.steps.step_seconds),
        "data_wait_share": waited / seconds if seconds > 0 else None,
        "mfu": known(run.steps.mfu),
        "peak_memory_bytes": max(memory) or None,
        "goodput": known(run.goodput.share),
        "wall_seconds": run.goodput.seconds,
        "undone_seconds": run.goodput.parts.get(UNDONE, 0.0),
        "starts": len(run.starts),
        "losses_not_finite": run.steps.not_finite,
        "anomalies": sum(run.anomaly_counts.values()),
        "alerts": sum(run.alert_counts.values()),
    }


def known(value: float) -> float | None:
    """None in place of NaN."""
    return None if math.isnan(value) else value


def flattened(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted keys and what they hold; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{above}{key}"
        found |= flattened(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Dotted keys that are not alike in all, with the value of each; ABSENT where one has no such key.

    The folder is left out: it is the name of a run.
    """
    flat = [flattened(each) for each in settings]
    keys = dict.fromkeys(key for each in flat for key in each)
    values = {key: [each.get(key, ABSENT) for each in flat] for key in keys if key != "folder"}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Losses of several runs at one moment."""

    at: float
    """A step, or seconds of training."""
    steps: list[int]
    """Of each run."""
    losses: list[float | None]
    """The mean of the last 5 % of the steps up to there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    settings: dict[str, list[Any]]
    """Those that differ, of each run."""
    environment: dict[str, list[Any]]
    """What differs of versions and machines, at the last start of each."""
    figures: list[dict[str, float | int | str | None]]
    at_equal_steps: list[Meeting]
    at_equal_time: list[Meeting]
    """Time in the steps that stand: no starts, no evaluations, nothing that was undone."""


def compare(runs: Sequence[History]) -> Comparison:
    """Also of runs of other recipes; then it is for the reader to say what the losses have in common."""
    machines = [{name: run.environments[-1][name] for name in _MACHINE if name in run.environments[-1]}
                if run.environments else {} for run in runs]  # fmt: skip
    last_step = min(run.last_step for run in runs)
    seconds = min(sum(group.seconds for group in run.steps.groups) for run in runs)
    return Comparison(
        settings=differing([run.recipe for run in runs]),
        environment=differing(machines),
        figures=[figures(run) for run in runs],
        at_equal_steps=[_meet(runs, step, [step] * len(runs)) for step in _quarters(last_step)],
        at_equal_time=[
            _meet(runs, at, [run.step_after(at) for run in runs])
            for at in (seconds * part / _PARTS for part in range(1, _PARTS + 1))
            if seconds > 0
        ],
    )


def _meet(runs: Sequence[History], at: float, steps: list[int]) -> Meeting:
    return Meeting(at=at, steps=steps, losses=[known(run.loss_at(step)) for run, step in zip(runs, steps)])


def _quarters(steps: int) -> list[int]:
    return sorted({steps * part // _PARTS for part in range(1, _PARTS + 1)} - {0})
