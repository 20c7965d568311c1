from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.cli.run_page import print_run
from trainfleet.errors import ConfigError, StoreError
from trainfleet.events import (
    AlertFired,
    AnomalySeen,
    CheckpointFailed,
    CheckpointSaved,
    Evaluated,
    Event,
    Noted,
    RanksReported,
    Restored,
    RunEnded,
    RunStarted,
    StepEnded,
    Tracked,
)
from trainfleet.monitor.history import compare, read_run, standing
from trainfleet.monitor.history import run as module
from trainfleet.monitor.history.goodput import UNDONE
from trainfleet.monitor.jsonl import JsonLines, read_metrics
from trainfleet.monitor.run_folder import RunFolder
from trainfleet.monitor.wide_table import write_wide_table


def write(folder: Path, *events: Event) -> Path:
    log = JsonLines(folder / "metrics.jsonl")
    for event in events:
        log.on_event(event)
    log.close()
    return folder


def test_a_whole_run_comes_back(tmp_path: Path, story: Any) -> None:
    RunFolder(tmp_path).write_recipe("train: {steps: 40, seed: 7}\n")
    RunFolder(tmp_path).write_environment(world_size=2)
    saved = CheckpointSaved(step=40, path="x", seconds=0.5)
    failed = CheckpointFailed(step=20, reason="No space left")
    run = read_run(write(tmp_path, *story.run(), failed, saved))
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [(g.step, g.loss, g.seconds) for g in run.steps.groups] == [
        (row["step"], row["loss"], row["seconds"]) for row in rows
    ]
    assert (run.end, run.running, run.last_step, run.starts[0].world_size) == ("finished", None, 40, 2)
    assert [e.step for e in run.evaluations] == [10, 20, 30, 40] and run.best is run.evaluations.last
    assert run.baselines == {"unigram": 3.29, "trigram": 1.87} and run.summary == {"validation loss": 1.67}
    assert run.recipe["train"]["seed"] == 7 and run.environments[0]["world_size"] == 2
    assert run.steps.tokens_per_second == pytest.approx(10_240) and run.notes[0]["title"] == "generated"
    assert dataclasses.astuple(run.saves) == (1, 1, 40, 0.5, "No space left")
    assert run.loss_at(40) == pytest.approx((rows[-1]["loss"] + rows[-2]["loss"]) / 2) and run.step_after(1.05) == 10
    assert sum(run.goodput.parts.values()) == pytest.approx(run.goodput.seconds)


def test_a_run_that_was_killed_and_resumed_counts_its_steps_once(tmp_path: Path, story: Any) -> None:
    write(tmp_path, story.started(), *[story.step(n) for n in range(1, 10)])
    again = [
        story.started(start_step=6),
        *[story.step(n, loss=2.0) for n in (7, 8)],
        Tracked(step=8, name="a", value=1),
    ]
    run = read_run(write(tmp_path, *again))
    assert [g.step for g in run.steps.groups] == list(range(1, 9)) and run.last and run.last.loss == 2.0
    assert [start.step for start in run.starts] == [0, 6] and run.end == "ended without a word"
    assert run.goodput.parts[UNDONE] == pytest.approx(0.3), "three steps were taken twice"
    assert run.tracked["a"].last == 1


def test_a_rollback_undoes_steps_and_evaluations(tmp_path: Path, story: Any) -> None:
    bad = [story.step(n, loss=math.nan) for n in (3, 4)]
    undone = [Evaluated(step=4, loss=0.1), Tracked(step=4, name="a", value=9.0)]
    run = read_run(
        write(tmp_path, story.started(), story.step(1), story.step(2), *bad, *undone, Restored(step=2, path="memory"),
              story.step(3), RunEnded(step=3, reason="finished", seconds=1.0))
    )  # fmt: skip
    assert run.steps.not_finite == 0 and run.last_step == 3 and run.best is None and "a" not in run.tracked


def test_a_run_under_way_is_one_with_its_time_going_on(tmp_path: Path, story: Any) -> None:
    write(tmp_path, story.started(), story.step(1))
    hold = RunFolder(tmp_path).hold()
    run = read_run(tmp_path, now=time.time() + 100)
    assert run.end == "running" and "process" in (run.running or "")
    assert run.goodput.seconds > 99 and run.goodput.share < 0.01
    hold.close()
    assert read_run(tmp_path).end == "ended without a word"


def test_torn_and_foreign_lines_are_counted_and_nothing_else(tmp_path: Path, story: Any) -> None:
    write(tmp_path, story.started(), story.step(1))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n\xff\n{"event": "RunStarted", "time": 1, "step": 3}\n{"event": "Tracked", "step": 1}\n')
        file.write(b'{"event": "FromTheFuture", "time": 2}\n{"event": "StepEnded", "time": 3, "step": 2, "lo')
    run = read_run(tmp_path)
    assert run.num_torn == 5 and [g.step for g in run.steps.groups] == [1]


@pytest.mark.parametrize("content", [b"", b"\n", b"\x00" * 1000])
def test_a_file_without_a_step_is_a_run_that_has_not_begun(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    run = read_run(tmp_path)
    assert (run.end, run.last_step, run.last) == ("not begun", 0, None) and math.isnan(run.goodput.share)
    assert math.isnan(run.steps.tokens_per_second) and math.isnan(run.loss_at(5)) and run.step_after(5.0) == 0


def test_what_is_no_run_is_a_sentence_that_names_the_runs_beside_it(tmp_path: Path, story: Any) -> None:
    write(tmp_path / "good", story.started())
    with pytest.raises(StoreError, match="There is no folder") as missing:
        read_run(tmp_path / "god")
    assert str(tmp_path / "good") in str(missing.value.hint)
    with pytest.raises(StoreError, match="is no run: it has neither") as none:
        read_run(tmp_path)
    assert str(tmp_path / "good") in str(none.value.hint)
    (tmp_path / "silent").mkdir()
    RunFolder(tmp_path / "silent").write_recipe("{}\n")
    with pytest.raises(StoreError, match=r"silent has no metrics\.jsonl") as silent:
        read_run(tmp_path / "silent")
    assert "monitor.jsonl=false" in str(silent.value.hint)


def test_a_spoilt_recipe_is_what_the_run_told_of_itself_or_a_sentence(tmp_path: Path, story: Any) -> None:
    RunFolder(tmp_path).write_recipe("train: {steps: [\n")
    assert read_run(write(tmp_path, story.started())).recipe == {"train": {"steps": 40}}
    write(tmp_path, story.started(recipe={}))
    with pytest.raises(ConfigError, match=r"recipe\.yaml.* is not YAML"):
        read_run(tmp_path)


def test_reports_of_ranks_anomalies_and_alerts_are_kept_and_counted(tmp_path: Path, story: Any) -> None:
    write(tmp_path, story.started(), story.step(1))
    ranks = [
        {"host": "a", "device": "cpu", "seconds": 1.0, "phases": {"forward": n}, "memory_bytes": n} for n in (1, 2)
    ]
    rows = [{"event": "RanksReported", "time": 1.0, "step": 1, "steps": 1, "ranks": ranks}] * 2
    seen = {"event": "AnomalySeen", "time": 2.0, "step": 9, "kind": "nan loss", "what": "NaN", "policy": "skip"}
    fired = {"event": "AlertFired", "time": 2.0, "step": 1, "alert": "loss > 5", "value": 6.0}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*rows, *[seen] * 150, fired])
    run = read_run(tmp_path)
    assert [slow.rank for slow in run.ranks.slow] == [1] and list(run.memory) == [(1, (1, 2))] * 2
    assert run.anomaly_counts == {("nan loss", "skip"): 150} and len(run.anomalies) == module.MAX_TEXTS
    assert run.alert_counts == {"loss > 5": 1}


def test_a_long_run_with_thousands_of_names_takes_little_memory(
    tmp_path: Path, story: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_NAMES", 1000)
    write(tmp_path, story.started(), story.step(1))
    first, line = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.write(first + b"\n")
        for step in range(1, 8_001):
            file.write(line.replace(b'"step": 1,', f'"step": {step},'.encode()) + b"\n")
        for name in range(1500):
            tracked = {"event": "Tracked", "time": 1.0, "step": 8_000, "name": f"n{name}", "value": 1.0}
            file.write(json.dumps(tracked).encode() + b"\n")
    tracemalloc.start()
    run = read_run(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert run.steps.every == 2 and len(run.steps.groups) == 4000 and run.last_step == 8_000
    assert len(run.tracked) == 1000 and run.num_left_out == 500
    assert run.loss_at(8_000) == pytest.approx(1.5 + 4 * math.exp(-0.1))
    assert peak < 6_000_000


def _fields_of(cls: type) -> list[str]:
    return [each.name for each in dataclasses.fields(cls)]


_EVENTS = [StepEnded, Evaluated, Tracked, RunStarted, RunEnded, Restored, RanksReported, AnomalySeen, AlertFired, Noted]
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**20) | st.floats().map(lambda x: x if math.isfinite(x) else "NaN")
    | st.sampled_from(["", "NaN", "Infinity", "forward", "x" * 300, "\x1b[2J"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["forward", "phases", "b"]), inner),
    max_leaves=4,
)  # fmt: skip
_ROWS = st.sampled_from(_EVENTS).flatmap(
    lambda cls: st.fixed_dictionaries(
        {"event": st.just(cls.__name__)}, optional=dict.fromkeys(["time", *_fields_of(cls)], _VALUES)
    )
)


@settings(max_examples=60)
@given(st.lists(_ROWS, max_size=8))
def test_whatever_a_file_holds_it_is_read_and_shown(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = read_run(path)
        assert run.num_torn <= len(rows) and run.goodput.seconds >= 0
        assert math.isnan(run.goodput.share) or 0 <= run.goodput.share <= 1 + 1e-9
        compare([run, run])
        write_wide_table(standing(path / "metrics.jsonl"), io.StringIO())
        with contextlib.redirect_stdout(io.StringIO()) as page:
            print_run(run, {})
        assert "\x1b" not in page.getvalue()
