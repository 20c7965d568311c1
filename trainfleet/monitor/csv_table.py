"""Every number of a run as CSV while the run goes on: `step,time,name,value`, a row for each number.

The columns are stated before the first number is known. A number that turns up later, such as one's own tracked in
the thousandth step, is a further row and no further column: nothing is rewritten, a resumed run goes on in the same
file, and a kill tears at most the last row. For a table with a column for each number ask afterwards:
`trainfleet runs show RUN --csv`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainfleet.events import Evaluated, Event, StepEnded, Tracked
from trainfleet.monitor.journal import Journal

COLUMNS = ("step", "time", "name", "value")


class CsvTable:
    """Appends to `path`. A step that is taken again is there again: of equal (step, name) the last row counts.

    Names are those of `read_metrics`, with `phases.forward` for what is in a mapping; what is not finite stands as
    `nan`, `inf` or `-inf`, and what is not known has no row.
    """

    in_loop = True

    def __init__(self, path: str | Path) -> None:
        self._journal = Journal(path, separator=b"\n")
        self._path = Path(path)
        self._is_begun = False

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepEnded):
            self._append(event.step, numbers_of(event))
        elif isinstance(event, Evaluated):
            values = {"loss": event.loss, "seconds": event.seconds, **event.metrics}
            self._append(event.step, {f"validation_{name}": value for name, value in values.items()})
        elif isinstance(event, Tracked):
            self._append(event.step, {event.name: event.value})

    def close(self) -> None:
        self._journal.close()

    def _append(self, step: int, values: Mapping[str, Any]) -> None:
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        if not self._is_begun and not (self._path.exists() and self._path.stat().st_size):
            writer.writerow(COLUMNS)
        self._is_begun = True
        now = f"{time.time():.3f}"
        writer.writerows([step, now, name, _cell(value)] for name, value in values.items())
        self._journal.append(rows.getvalue().removesuffix("\n").encode(errors="replace"))


def numbers_of(event: StepEnded) -> dict[str, float]:
    """Those that are known, by name: of fields, and of what is in mappings."""
    numbers: dict[str, float] = {}
    for field in dataclasses.fields(event):
        value = getattr(event, field.name)
        if isinstance(value, Mapping):
            numbers |= {f"{field.name}.{key}": seconds for key, seconds in value.items()}
        elif value is not None and field.name != "step":
            numbers[field.name] = value
    return numbers


def _cell(value: Any) -> int | float:
    """ValueError or TypeError for what is no number."""
    return int(value) if isinstance(value, int) else float(value)
