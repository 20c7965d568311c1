"""The oracle is `read_metrics`, which holds everything in memory and does as it is told, line by line."""

from __future__ import annotations

import math
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.errors import StoreError
from trainfleet.events import Evaluated, Event, Noted, Restored, RunStarted, StepEnded, Tracked
from trainfleet.monitor.history.standing import standing
from trainfleet.monitor.jsonl import JsonLines, read_metrics

steps = st.integers(0, 12)


def step_ended(step: int, loss: float) -> StepEnded:
    return StepEnded(
        step=step, loss=loss, learning_rate=0.1, grad_norm=None, samples=1, tokens=1, seconds=0.1, data_seconds=0.0
    )


def run_started(step: int) -> RunStarted:
    return RunStarted(folder=None, steps=12, start_step=step, world_size=1, parameters=1, plan="")


events = st.one_of(
    st.builds(step_ended, steps, st.floats()),
    st.builds(run_started, steps),
    st.builds(Restored, step=steps, path=st.just("memory")),
    st.builds(Evaluated, step=steps, loss=st.floats(), metrics=st.dictionaries(st.sampled_from("ab"), st.floats())),
    st.builds(Tracked, step=steps, name=st.sampled_from(["mine", "loss"]), value=st.floats()),
    st.builds(Noted, step=steps, title=st.just("x"), text=st.just('{"event": "StepEnded"')),
)


def write(path: Path, *events: Event) -> None:
    log = JsonLines(path)
    for event in events:
        log.on_event(event)
    log.close()


@settings(max_examples=60)
@given(st.lists(events, max_size=25), st.booleans())
def test_it_gives_what_reading_all_into_memory_gives(written: list[Event], torn: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.touch()
        write(path, *written)
        if torn:
            with path.open("ab") as file:
                file.write(b'{"event": "StepEnded", "time": 1.0, "step": 3, "lo')
        found = standing(path)
        rows = list(found.merged())
        plain = read_metrics(path)
    for row in (*rows, *plain):
        row.pop("time")
    assert [_comparable(row) for row in rows] == [_comparable(row) for row in plain]


def _comparable(row: dict[str, Any]) -> dict[str, Any]:
    return {name: repr(value) for name, value in row.items()}  # NaN is not equal to itself


def test_lines_that_are_written_meanwhile_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, run_started(0), step_ended(1, 1.0), step_ended(2, 1.0))
    before = standing(path)
    write(path, step_ended(1, 9.0))
    assert [row["loss"] for row in before.merged()] == [1.0, 1.0]
    assert [row["loss"] for row in standing(path).merged()] == [9.0]


def test_lines_of_another_shape_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, step_ended(1, 1.0), step_ended(2, 1.0))
    with path.open("ab") as file:
        file.write(b'{"time":1.0,"event":"Restored","step":1,"path":"x"}\n[1]\n\xff\xfe\n' + b"[" * 100_000 + b"\n")
    found = standing(path)
    assert [row["step"] for row in found.merged()] == [1] and found.num_steps == 1


def test_what_is_tracked_long_after_its_step_is_a_row_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *[step_ended(step, 1.0) for step in range(1, 10)], Tracked(step=1, name="late", value=7.0))
    rows = list(standing(path).merged(window=3))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 1, 6, 7, 8, 9] and rows[5]["late"] == 7.0


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, run_started(0), step_ended(1, math.nan))
    line = path.read_bytes().splitlines()[1]
    with path.open("wb") as file:
        for step in range(1, 20_001):
            file.write(line.replace(b'"step": 1,', f'"step": {step},'.encode()) + b"\n")
    tracemalloc.start()
    found = standing(path)
    assert found.num_steps == 20_000
    assert sum(math.isnan(row["loss"]) for row in found.merged(window=10)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


def test_a_file_that_is_missing_or_a_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has no metrics\.jsonl"):
        standing(tmp_path / "metrics.jsonl")
    with pytest.raises(StoreError, match="cannot be read: Is a directory"):
        standing(tmp_path)
