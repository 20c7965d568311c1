from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from trainfleet.events import Evaluated, Event, Tracked
from trainfleet.monitor.csv_table import COLUMNS, CsvTable


def write(path: Path, *events: Event) -> list[list[str]]:
    table = CsvTable(path)
    for event in events:
        table.on_event(event)
    table.close()
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_every_number_is_a_row_under_columns_that_never_change(tmp_path: Path, story: Any) -> None:
    evaluated = Evaluated(step=1, loss=2.5, metrics={"accuracy": 0.5}, seconds=9.0)
    late = Tracked(step=2, name='a "name", in\nlines', value=4.0)
    step = story.step(2, phases={"forward": 0.25}, grad_norm=None, loss=math.inf)
    head, *rows = write(tmp_path / "m.csv", story.step(1), evaluated, step, late)
    assert tuple(head) == COLUMNS and all(len(row) == 4 for row in rows)
    values = {(row[0], row[2]): float(row[3]) for row in rows}
    assert next([row[0], row[3]] for row in rows if row[2] == "samples") == ["1", "8"]
    assert values["1", "loss"] == story.step(1).loss and values["2", "phases.forward"] == 0.25
    assert values["1", "validation_accuracy"] == 0.5 and values["2", late.name] == 4.0
    assert values["2", "loss"] == math.inf and ("2", "grad_norm") not in values and ("1", "grad_norm") in values


def test_a_resumed_run_goes_on_in_the_same_file_after_a_torn_row(tmp_path: Path, story: Any) -> None:
    path = tmp_path / "m.csv"
    write(path, story.step(1), story.step(2))
    with path.open("a") as file:
        file.write("3,17")
    rows = write(path, story.step(2, loss=7.0))
    assert rows.count(list(COLUMNS)) == 1 and ["3", "17"] in rows
    losses = {row[0]: float(row[3]) for row in rows if len(row) == 4 and row[2] == "loss"}
    assert losses["2"] == 7.0, "the last row counts"


def test_a_table_is_written_where_other_events_come_first(tmp_path: Path, story: Any) -> None:
    rows = write(tmp_path / "m.csv", *story.run())
    assert [row[2] for row in rows].count("loss") == 40
