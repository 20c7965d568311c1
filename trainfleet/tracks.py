"""Numbers of the user's own, told wherever they arise, and reduced over steps and ranks as declared.

    def loss_fn(output, batch):
        track("accuracy", (output.argmax(-1) == batch["label"]).float().mean())
        return cross_entropy(output, batch["label"])

A number that is told several times between two reports counts each time, under `mean` and `sum`. A tensor may stay on
its device: it is looked at only when the report is made. What is told in an evaluation belongs to that evaluation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal, TypeAlias

logger = logging.getLogger(__name__)

Reduce: TypeAlias = Literal["mean", "sum", "max", "min"]
REDUCTIONS: tuple[Reduce, ...] = ("mean", "sum", "max", "min")

MAX_NAMES = 10_000
"""More names than that are a number in the name by mistake; those beyond are left out and counted."""
MAX_WAITING = 1_000
"""Values of a name that wait to be looked at; then they are looked at at once."""


_open: ContextVar[Tracks | None] = ContextVar("tracks", default=None)
"""A rank is a process, or a thread: each has its own, which an observer called beside the loop has too."""


def track(name: str, value: Any, step: int | None = None, *, reduce: Reduce = "mean", weight: float = 1.0) -> None:
    """Tell a number to the run that this thread is in; outside of one nothing happens.

    `value` is a number, or an array or a tensor of one element; what is none is left out with one warning. `step` is
    the step under way unless given. `reduce` says what becomes of the values of all ranks, and of several since the
    last report: their mean, to which each adds by its `weight` (such as its number of samples, where batches are not
    alike), sum, largest or smallest.
    """
    if (tracks := _open.get()) is not None:
        tracks.add(name, value, step, reduce, weight)


class Tracks:
    """The numbers told on this rank since they were last taken; entered, it is what `track` tells."""

    def __init__(self, *, counts: bool = True) -> None:
        """Without `counts` nothing is kept: another rank computes the same, and tells it."""
        self._counts = counts
        self.step = 0
        """The step under way."""
        self.left_out = 0
        """Values that were no numbers, or of names beyond MAX_NAMES."""
        self._waiting: dict[tuple[str, Reduce], list[tuple[Any, float]]] = {}
        self._steps: dict[tuple[str, Reduce], int] = {}
        self._sums: dict[tuple[str, Reduce], list[float]] = {}  # [sum, weight, largest, smallest]
        self._before: Tracks | None = None

    def add(self, name: str, value: Any, step: int | None = None, reduce: Reduce = "mean", weight: float = 1.0) -> None:
        """See `track`."""
        if not self._counts:
            return
        if reduce not in REDUCTIONS:
            raise ValueError(f"track({name!r}) has reduce={reduce!r}; use one of {', '.join(REDUCTIONS)}.")
        key = (str(name), reduce)
        if key not in self._steps and len(self._steps) >= MAX_NAMES:
            self._leave_out(name, f"is the name after {MAX_NAMES} others; keep numbers that change out of names")
            return
        if getattr(value, "requires_grad", False):
            value = value.detach()  # the graph behind it would stay
        self._steps[key] = self.step if step is None else step
        waiting = self._waiting.setdefault(key, [])
        waiting.append((value, weight if reduce == "mean" else 1.0))
        if len(waiting) >= MAX_WAITING:
            self._look_at(key)

    def take(self) -> list[list[Any]]:
        """[name, reduce, step, weighted sum, weight, largest, smallest] of each name, for JSON; forgets them."""
        for key in list(self._waiting):
            self._look_at(key)
        taken = [[*key, self._steps[key], *map(_as_json, sums)] for key, sums in self._sums.items()]
        self._sums = {}
        self._steps = {}
        return taken

    def _look_at(self, key: tuple[str, Reduce]) -> None:
        for value, weight in self._waiting.pop(key):
            try:
                number = float(value.item() if hasattr(value, "item") else value)
            except (TypeError, ValueError, RuntimeError) as exc:
                shape = getattr(value, "shape", None)
                kind = f"an array of shape {tuple(shape)}" if shape else f"a {type(value).__name__}"
                self._leave_out(key[0], f"is {kind}, not a number ({exc}); give its mean, or one element")
                continue
            sums = self._sums.setdefault(key, [0.0, 0.0, -math.inf, math.inf])
            sums[0] += number * weight
            sums[1] += weight
            sums[2] = number if math.isnan(number) else max(sums[2], number)
            sums[3] = number if math.isnan(number) else min(sums[3], number)

    def _leave_out(self, name: str, why: str) -> None:
        if not self.left_out:
            logger.warning("The tracked value %r %s. It is left out, and so are others, without a word.", name, why)
        self.left_out += 1

    def __enter__(self) -> Tracks:
        self._before = _open.get()
        _open.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.set(self._before)


def reduced(of_ranks: Sequence[Sequence[Sequence[Any]]]) -> dict[str, tuple[int, float]]:
    """(step, value) by name from what `Tracks.take` gave on each rank; ranks may have told different names."""
    sums: dict[tuple[str, str], list[float]] = {}
    steps: dict[tuple[str, str], int] = {}
    for taken in of_ranks:
        for name, reduce, step, *numbers in taken:
            total, weight, largest, smallest = map(_as_float, numbers)
            held = sums.setdefault((name, reduce), [0.0, 0.0, -math.inf, math.inf])
            held[0] += total
            held[1] += weight
            held[2] = largest if math.isnan(largest) else max(held[2], largest)
            held[3] = smallest if math.isnan(smallest) else min(held[3], smallest)
            steps[name, reduce] = max(step, steps.get((name, reduce), step))
    return {name: (steps[name, reduce], _value(reduce, held)) for (name, reduce), held in sums.items()}


def _value(reduce: str, held: Sequence[float]) -> float:
    total, weight, largest, smallest = held
    return {"mean": total / weight if weight else math.nan, "sum": total, "max": largest, "min": smallest}[reduce]


_NOT_FINITE: Mapping[str, float] = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _as_json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def _as_float(value: float | str) -> float:
    return _NOT_FINITE[value] if isinstance(value, str) else value
