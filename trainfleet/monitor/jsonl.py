"""Every event of a run as one line of JSON, and the way back.

    {"event": "StepEnded", "time": 1767225600.0, "step": 1, "loss": 5.545, ...}

Strict JSON: a float that is not finite is written as "NaN", "Infinity" or "-Infinity" and read back as a float.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainfleet.events import Evaluated, Event, Restored, RunStarted, StepEnded, Tracked
from trainfleet.monitor.journal import Journal

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonLines:
    """Appends to `path` (a resumed run goes on in the same file); each line is with the system before the next step.

    A full disk never stops the run: see `Journal`.
    """

    in_loop = True

    def __init__(self, path: str | Path) -> None:
        self._journal = Journal(path, separator=b"\n")

    def on_event(self, event: Event) -> None:
        self._journal.append(to_json(event, written_at=time.time()).encode())

    def close(self) -> None:
        self._journal.close()


def to_json(event: Event, *, written_at: float) -> str:
    """One line without its end; numbers of NumPy and torch become plain ones."""
    row: dict[str, Any] = {"event": type(event).__name__, "time": written_at}
    for field in dataclasses.fields(event):
        row[field.name] = getattr(event, field.name)
    try:
        return json.dumps(row, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(_plain(row), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else _name_of(value)
    if isinstance(value, (str, int)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if getattr(value, "shape", None) == ():
        return _plain(value.item())
    return str(value)


def _name_of(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Every line as it was written, also of steps that a rollback undid; lines torn by a kill are left out."""
    with Path(path).open("rb") as file:
        for line in file:
            if (row := parse_row(line)) is not None:
                yield row


def parse_row(line: bytes) -> dict[str, Any] | None:
    """What a line says; None where it is torn or no event."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # torn, or not text
        return None
    if not isinstance(row, dict) or not isinstance(row.get("event"), str):
        return None
    return _with_floats(row) if b'"NaN"' in line or b'Infinity"' in line else row


def read_events(path: str | Path) -> Iterator[Event]:
    """The same as events; those of classes or fields that are not known here are left out."""
    classes = {cls.__name__: cls for cls in _subclasses(Event)}
    for row in read_rows(path):
        if (cls := classes.get(row["event"])) is not None:
            known = {field.name for field in dataclasses.fields(cls)}
            try:
                event = cls(**{name: value for name, value in row.items() if name in known})
            except TypeError:  # written by a version that lacked a field
                continue
            yield event


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """One row a step, in order, as the run that stands now saw it; ready for a table or a picture.

    Keys: `time` and the fields of `StepEnded`; `validation_loss` and `validation_NAME` where that step was
    evaluated; `NAME` of each tracked number. A step that was taken again after a resume or a rollback counts
    as it was last written, and those after the point of return that were not taken again are gone.
    """
    steps: dict[int, dict[str, Any]] = {}
    latest = 0
    for row in read_rows(path):
        event = row.pop("event")
        if event in (RunStarted.__name__, Restored.__name__):
            latest = row.get("start_step", row.get("step", 0))
            steps = {step: kept for step, kept in steps.items() if step <= latest}
            continue
        if event == StepEnded.__name__:
            if row["step"] <= latest:  # rolled back without a word
                steps = {step: kept for step, kept in steps.items() if step < row["step"]}
            latest = row["step"]
            steps.setdefault(latest, {}).update(row)
        elif event == Evaluated.__name__:
            metrics = {"loss": row["loss"], **row.get("metrics", {})}
            at = steps.setdefault(row["step"], {"step": row["step"], "time": row["time"]})
            at.update({f"validation_{name}": value for name, value in metrics.items()})
        elif event == Tracked.__name__:
            at = steps.setdefault(row["step"], {"step": row["step"], "time": row["time"]})
            at[row["name"]] = row["value"]
    return [steps[step] for step in sorted(steps)]


def _with_floats(row: dict[str, Any]) -> dict[str, Any]:
    """Put the floats back that are not finite. Texts of events (titles, reasons) stay texts."""
    return {
        name: _floats_in(value) if name in _FLOATS or isinstance(value, dict) else value for name, value in row.items()
    }


def _floats_in(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _floats_in(item) for key, item in value.items()}
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _subclasses(cls: type[Event]) -> Iterator[type[Event]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


_FLOATS = {
    field.name for cls in _subclasses(Event) for field in dataclasses.fields(cls) if str(field.type).startswith("float")
}
