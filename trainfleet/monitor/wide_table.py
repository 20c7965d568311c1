"""A run as one table: a row for each step that stands, a column for each number."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from typing import Any, TextIO

from trainfleet.events import Evaluated, StepEnded, Tracked
from trainfleet.monitor.history.standing import Standing, values_of

MAX_COLUMNS = 1000
"""Of evaluations and tracked numbers; a wider table is one that no program shows."""
_FIRST = ("step", "time", "loss")


def write_wide_table(found: Standing, file: TextIO) -> int:
    """Write it as CSV; how many names were left out because there are more than MAX_COLUMNS.

    The file is read twice, for a CSV states its columns first. Numbers that are not finite stand as `nan`, `inf` and
    `-inf`, and what a step does not have is empty.
    """
    columns, left_out = _columns(found)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in found.merged():
        flat = _flat(row)
        writer.writerow([flat.get(name, "") for name in columns])
    return left_out


def _columns(found: Standing) -> tuple[list[str], int]:
    of_steps: dict[str, None] = dict.fromkeys(_FIRST)
    others: dict[str, None] = {}
    left_out: set[str] = set()
    for row, stands in found.rows():
        event = row.pop("event", None)
        if not stands:
            continue
        if event == StepEnded.__name__:
            of_steps |= dict.fromkeys(_flat(row))
        elif event in (Evaluated.__name__, Tracked.__name__):
            for name in values_of(event, row):
                if name in others or len(others) < MAX_COLUMNS:
                    others[name] = None
                else:
                    left_out.add(name)
    return [*of_steps, *sorted(name for name in others if name not in of_steps)], len(left_out)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers only: `phases.forward` of a mapping, nothing of a text."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": _cell(item) for key, item in value.items()}
        elif not isinstance(value, (str, list)):
            flat[name] = _cell(value)
    return flat


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return "" if value is None else value
