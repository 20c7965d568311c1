from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.events import Evaluated, Event, Noted, Restored, RunEnded, RunStarted, StepEnded, Tracked
from trainfleet.monitor.jsonl import JsonLines, read_events, read_metrics, read_rows

text = st.text(st.characters(codec="utf-8"), max_size=20)
entry = text.filter(lambda word: word not in ("NaN", "Infinity", "-Infinity"))
step = st.integers(0, 10**9)
number = st.floats()
events = st.one_of(
    st.builds(
        StepEnded, step=step, loss=number, learning_rate=number, grad_norm=st.none() | number, samples=step,
        tokens=step, seconds=number, data_seconds=number, skipped=st.booleans(), loss_scale=st.none() | number,
        memory_bytes=step,
    ),
    st.builds(Evaluated, step=step, loss=number, metrics=st.dictionaries(text, number, max_size=3), seconds=number),
    st.builds(Tracked, step=step, name=text, value=number),
    st.builds(Noted, step=step, title=text, text=text),
    st.builds(RunEnded, step=step, reason=text, seconds=number, summary=st.dictionaries(text, number | entry)),
    st.builds(
        RunStarted, folder=st.none() | text, steps=step, start_step=step, world_size=step, parameters=step, plan=text,
        recipe=st.recursive(number | entry | st.booleans() | st.none(), lambda x: st.dictionaries(text, x)).map(
            lambda value: {"recipe": value}
        ),
    ),
)  # fmt: skip


def write(path: Path, *events: Event) -> None:
    log = JsonLines(path)
    for event in events:
        log.on_event(event)
    log.close()


@given(st.lists(events, max_size=5))
def test_every_event_comes_back_as_it_was(written: list[Event]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        write(path, *written)
        read = list(read_events(path)) if path.exists() else []
    assert repr(read) == repr(written)  # repr, for NaN is not equal to itself


def test_lines_are_strict_json_with_type_and_time(tmp_path: Path, story: Any) -> None:
    write(tmp_path / "m.jsonl", story.step(1, loss=math.nan, grad_norm=math.inf))
    (line,) = (tmp_path / "m.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (row["event"], row["loss"], row["grad_norm"]) == ("StepEnded", "NaN", "Infinity")
    assert row["time"] > 1.7e9


def test_each_line_is_there_before_the_next_step(tmp_path: Path, story: Any) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    log.on_event(story.step(1))
    assert len(list(read_rows(tmp_path / "m.jsonl"))) == 1
    log.close()


def test_numbers_of_numpy_are_written_as_plain_ones(tmp_path: Path, story: Any) -> None:
    write(tmp_path / "m.jsonl", story.step(np.int64(3), loss=np.float32(0.5), grad_norm=np.array(np.nan)))
    (row,) = read_rows(tmp_path / "m.jsonl")
    assert (row["step"], row["loss"]) == (3, 0.5) and math.isnan(row["grad_norm"])


def test_a_resumed_run_counts_its_steps_once_as_last_written(tmp_path: Path, story: Any) -> None:
    path = tmp_path / "m.jsonl"
    write(path, story.started(), *[story.step(step, loss=1.0) for step in range(1, 10)])
    write(path, story.started(start_step=6), *[story.step(step, loss=2.0) for step in (7, 8)])
    rows = read_metrics(path)
    assert [(row["step"], row["loss"]) for row in rows] == [(n, 1.0) for n in range(1, 7)] + [(7, 2.0), (8, 2.0)]


@pytest.mark.parametrize("told", [True, False])
def test_a_rollback_within_a_run_undoes_later_steps_and_their_numbers(tmp_path: Path, story: Any, told: bool) -> None:
    path = tmp_path / "m.jsonl"
    before = [story.step(1), story.step(2), story.step(3), Tracked(step=3, name="accuracy", value=0.9)]
    evaluated = Evaluated(step=3, loss=7.0, metrics={"accuracy": 0.5})
    write(path, story.started(), *before, evaluated, *[Restored(step=1, path="x")] * told, story.step(2, loss=5.0))
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["loss"] == 5.0


def test_a_row_holds_the_step_its_evaluation_and_what_was_tracked(tmp_path: Path, story: Any) -> None:
    path = tmp_path / "m.jsonl"
    evaluated = Evaluated(step=1, loss=2.5, metrics={"accuracy": 0.5}, seconds=9.0)
    write(path, story.step(1), Tracked(step=1, name="mine", value=4.0), evaluated)
    (row,) = read_metrics(path)
    assert (row["mine"], row["validation_loss"], row["validation_accuracy"], row["seconds"]) == (4.0, 2.5, 0.5, 0.1)


def test_torn_and_foreign_lines_are_left_out(tmp_path: Path, story: Any) -> None:
    path = tmp_path / "m.jsonl"
    write(path, story.step(1))
    with path.open("ab") as file:
        file.write(b'[1]\n"x"\n\xff\xfe\n{"event": "FromTheFuture", "time": 1}\n{"event": "StepEnded", "st')
    write(path, story.step(2))
    assert [event.step for event in read_events(path)] == [1, 2]  # type: ignore[attr-defined]
