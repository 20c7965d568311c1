"""Which lines of metrics.jsonl stand in the end: a resume or a rollback undoes steps that were written before it."""

from __future__ import annotations

import dataclasses
import heapq
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainfleet.errors import StoreError
from trainfleet.events import Evaluated, Event, Restored, RunStarted, StepEnded, Tracked
from trainfleet.monitor.jsonl import parse_row

_HEAD = re.compile(rb'\{"event": "(\w+)", "time": [^,{}]+, (?:"step": (\d+), )?')
"""How our own lines begin, so that the first pass need not parse them."""
_RETURNS = {RunStarted.__name__: "start_step", Restored.__name__: "step"}
"""Events that say to which step a run went back, and where in them."""
_WITH_STEP = {
    cls.__name__ for cls in Event.__subclasses__() if any(field.name == "step" for field in dataclasses.fields(cls))
}
WINDOW = 1000
"""Steps for which a row waits for what was tracked or evaluated at its step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Lines between two points of return."""

    end: int
    """Bytes of the file up to its end."""
    last: float
    """Of its steps those up to this one stand; infinity where nothing was undone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A metrics.jsonl as it was when it was looked at; what a run under way appends later does not count."""

    path: Path
    stretches: tuple[Stretch, ...]
    num_steps: int
    """Steps that stand; not exact where lines are torn in the middle of the file."""

    def rows(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Every line as `read_rows` gives it, and whether it stands; memory does not grow with the file.

        A line that was torn by a kill, or lacks the step of its event, comes as an empty row. One of an event that has
        no step stands.
        """
        stretches = iter(self.stretches)
        stretch = next(stretches, None)
        for end, line in _lines(self.path):
            while stretch is not None and end > stretch.end:
                stretch = next(stretches, None)
            if stretch is None:
                return
            row = parse_row(line) or {}
            step = row.get("step")
            if type(step) is int:
                yield row, step <= stretch.last
            else:
                yield ({} if row.get("event") in _WITH_STEP else row), True

    def merged(self, *, window: int = WINDOW) -> Iterator[dict[str, Any]]:
        """What `read_metrics` returns, row by row, in memory that does not grow with the file.

        The price: an evaluation or a tracked number whose step is more than `window` steps back finds its row gone and
        comes as a row of its own, and so out of order.
        """
        waiting: dict[int, dict[str, Any]] = {}
        order: list[int] = []  # the steps that wait, as a heap

        def at(step: int, time: float) -> dict[str, Any]:
            if step not in waiting:
                heapq.heappush(order, step)
                waiting[step] = {"step": step, "time": time}
            return waiting[step]

        for row, stands in self.rows():
            step = row.get("step")
            if not stands or not isinstance(step, int):
                continue
            event = row.pop("event")
            if event == StepEnded.__name__:
                while order and order[0] < step - window:
                    yield waiting.pop(heapq.heappop(order))
                at(step, math.nan).update(row)
            elif event in (Evaluated.__name__, Tracked.__name__):
                at(step, row.get("time", math.nan)).update(values_of(event, row))
        for step in sorted(order):
            yield waiting[step]


def values_of(event: str, row: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation or a tracked number adds to the row of its step, by name."""
    if event == Tracked.__name__:
        return {str(row.get("name")): row.get("value")}
    metrics = row.get("metrics")
    values = {"loss": row.get("loss"), **(metrics if isinstance(metrics, dict) else {})}
    return {f"validation_{name}": value for name, value in values.items()}


@dataclass(kw_only=True, slots=True)
class _Part:
    begin: int
    back: int
    """The step to which the run went back before it."""
    latest: int
    num_steps: int = 0


def standing(path: str | Path) -> Standing:
    """Look through the file once, parsing only its starts; StoreError where it cannot be read."""
    parts = [_Part(begin=0, back=0, latest=0)]
    end = 0
    for line_end, line in _lines(Path(path)):
        begin, end = end, line_end
        event, step = _look_at(line)
        if step is None:
            continue
        is_step = event == StepEnded.__name__
        if event in _RETURNS or (is_step and step <= parts[-1].latest):
            back = step - 1 if is_step else step
            parts.append(_Part(begin=begin, back=back, latest=back))
        if is_step:
            parts[-1].latest = step
            parts[-1].num_steps += 1
    stretches = []
    last, num_steps = math.inf, 0
    for part in reversed(parts):
        stretches.append(Stretch(end=end, last=last))
        num_steps += int(max(0, part.num_steps - max(0, part.latest - last)))
        end, last = part.begin, min(last, part.back)
    return Standing(path=Path(path), stretches=tuple(reversed(stretches)), num_steps=num_steps)


def _look_at(line: bytes) -> tuple[str, int | None]:
    """The event of a line, and the step in which it ended or to which it returns."""
    head = _HEAD.match(line)
    if head is not None and line.rstrip().endswith(b"}"):
        event = head[1].decode()
        if event not in _RETURNS:
            return event, int(head[2]) if head[2] else None
    row = parse_row(line)
    if row is None:
        return "", None
    step = row.get(_RETURNS.get(row["event"], "step"))
    return row["event"], step if type(step) is int else None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line and where it ends, in bytes."""
    end = 0
    try:
        with path.open("rb") as file:
            for line in file:
                end += len(line)
                yield end, line
    except FileNotFoundError as error:
        raise StoreError(
            f"{path.parent} has no {path.name}.",
            hint="The run has not come to its first step, or was told monitor.jsonl=false.",
        ) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}.") from error
