"""The numbers of a run by the names that alerts know, as its events tell them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from trainfleet.events import Evaluated, Event, RanksReported, StepEnded, Tracked

_FIELDS = tuple(field.name for field in dataclasses.fields(StepEnded) if field.name not in ("step", "phases", "waits"))
_RATES = {"tokens_per_second": "tokens", "samples_per_second": "samples"}
OF_STEPS = (*_FIELDS, *_RATES)


def number_in(event: Event, name: str, *, wants_largest: bool) -> float | None:
    """The number of that name which `event` tells; of several ranks' the largest or the smallest. None: none."""
    if isinstance(event, StepEnded):
        return _number_of_step(event, name)
    if isinstance(event, Tracked):
        return _as_float(event.value) if event.name == name and name not in OF_STEPS else None
    if isinstance(event, Evaluated) and name.startswith("validation_"):
        metric = name.removeprefix("validation_")
        return _as_float(event.loss if metric == "loss" else event.metrics.get(metric))
    if isinstance(event, RanksReported) and name.startswith("system."):
        told = (each.get("system", {}).get(name.removeprefix("system.")) for each in event.ranks)
        numbers = [number for value in told if (number := _as_float(value)) is not None]
        nans = [number for number in numbers if math.isnan(number)]
        return nans[0] if nans else (max if wants_largest else min)(numbers, default=None)
    return None


def _number_of_step(event: StepEnded, name: str) -> float | None:
    if name in _FIELDS:
        return _as_float(getattr(event, name))
    if name in _RATES:
        amount = getattr(event, _RATES[name])
        return amount / event.seconds if event.seconds > 0 else None
    family, dot, below = name.partition(".")
    if dot and family in ("phases", "waits"):
        return _as_float(getattr(event, family).get(below))
    return None


class Row:
    """The newest number of every name: what the function of an alert is given after each step.

    `step`, the fields of StepEnded, rates, `validation_NAME`, tracked names, and `ranks` as RanksReported has them.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def update(self, event: Event) -> None:
        if isinstance(event, StepEnded):
            self.values |= {name: getattr(event, name) for name in ("step", "phases", "waits", *_FIELDS)}
            self.values |= {name: _number_of_step(event, name) for name in _RATES}
        elif isinstance(event, Tracked):
            if event.name not in OF_STEPS and event.name not in ("step", "phases", "waits"):
                self.values[event.name] = event.value
        elif isinstance(event, Evaluated):
            metrics = {"loss": event.loss, **event.metrics}
            self.values |= {f"validation_{name}": value for name, value in metrics.items()}
        elif isinstance(event, RanksReported):
            self.values["ranks"] = event.ranks


def names_in(event: Event) -> Iterator[str]:
    """What alerts can be about in it, to name what is near to one that never came."""
    if isinstance(event, StepEnded):
        yield from OF_STEPS
        yield from (f"phases.{phase}" for phase in event.phases)
    elif isinstance(event, Tracked):
        yield event.name
    elif isinstance(event, Evaluated):
        yield from (f"validation_{name}" for name in ("loss", *event.metrics))
    elif isinstance(event, RanksReported):
        yield from {f"system.{name}" for each in event.ranks for name in each.get("system", {})}


def _as_float(value: Any) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # no number, or an array of several
        return None
