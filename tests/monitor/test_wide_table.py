from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest

from trainfleet.events import Evaluated, Event, Tracked
from trainfleet.monitor import wide_table as module
from trainfleet.monitor.history import standing
from trainfleet.monitor.jsonl import JsonLines, read_metrics
from trainfleet.monitor.wide_table import write_wide_table


def table(path: Path, *events: Event) -> tuple[list[dict[str, str]], int]:
    log = JsonLines(path)
    for event in events:
        log.on_event(event)
    log.close()
    file = io.StringIO()
    left_out = write_wide_table(standing(path), file)
    return list(csv.DictReader(io.StringIO(file.getvalue()))), left_out


def test_a_row_is_a_step_that_stands_with_all_its_numbers(tmp_path: Path, story: Any) -> None:
    path = tmp_path / "m.jsonl"
    steps = [story.step(n, phases={"forward": n / 10}, skipped=n == 2) for n in (1, 2, 3)]
    evaluated = Evaluated(step=3, loss=2.5, metrics={"accuracy": 0.5})
    again = [story.started(start_step=2), story.step(3, loss=math.nan), evaluated, Tracked(step=3, name="b,c", value=1)]
    rows, left_out = table(path, story.started(), *steps, Tracked(step=3, name="undone", value=1), *again)
    assert left_out == 0 and [row["step"] for row in rows] == ["1", "2", "3"]
    assert [float(row["loss"]) for row in rows[:2]] == [row["loss"] for row in read_metrics(path)[:2]]
    assert (rows[1]["phases.forward"], rows[1]["skipped"], rows[1]["grad_norm"]) == ("0.2", "1", "0.5")
    assert (rows[2]["loss"], rows[2]["validation_accuracy"], rows[2]["b,c"]) == ("nan", "0.5", "1")
    assert rows[0]["b,c"] == "" and "undone" not in rows[0] and "event" not in rows[0]


def test_thousands_of_names_are_left_out_and_counted(
    tmp_path: Path, story: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_COLUMNS", 10)
    tracked = [Tracked(step=1, name=f"n{n}", value=1.0) for n in range(300)]
    rows, left_out = table(tmp_path / "m.jsonl", story.step(1), *tracked)
    assert left_out == 290 and sum(name.startswith("n") for name in rows[0]) == 10


def test_a_run_without_a_step_has_columns_and_no_row(tmp_path: Path, story: Any) -> None:
    assert table(tmp_path / "m.jsonl", story.started()) == ([], 0)
