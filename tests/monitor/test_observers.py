from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from trainfleet.errors import ConfigError
from trainfleet.events import Observers
from trainfleet.monitor.console import Console
from trainfleet.monitor.jsonl import read_metrics
from trainfleet.monitor.observers import MonitorConfig, observers_for
from trainfleet.monitor.run_folder import RunFolder


def names(observers: Any) -> list[str]:
    return [type(observer).__name__ for observer in observers]


def test_the_first_rank_has_all_and_the_others_none(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    folder = RunFolder(tmp_path)
    made = observers_for(MonitorConfig(), folder, True)
    assert names(made) == ["Console", "Samples", "JsonLines", "TensorBoard", "LossCurve"]
    assert observers_for(MonitorConfig(), folder, False) == []
    assert list(tmp_path.iterdir()) == [], "nothing is written before the first event"


def test_each_can_be_switched_off(tmp_path: Path) -> None:
    off = MonitorConfig(console=False, jsonl=False, tensorboard=False, curve=False)
    assert names(observers_for(off, RunFolder(tmp_path), True)) == ["Samples"]
    assert names(observers_for(MonitorConfig(), None, True)) == ["Console"]
    with_csv = MonitorConfig(console=False, jsonl=False, csv=True, tensorboard=False, curve=False)
    assert names(observers_for(with_csv, RunFolder(tmp_path), True)) == ["Samples", "CsvTable"]


def test_missing_libraries_are_one_warning_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    assert names(observers_for(MonitorConfig(), RunFolder(tmp_path), True)) == ["Console", "Samples", "JsonLines"]
    assert len(caplog.records) == 1 and "trainfleet[monitor]" in caplog.text


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"monitor\.log_interval is 0"):
        MonitorConfig(log_interval=0)


def test_a_run_leaves_its_folder_whole_and_its_failing_observers_silent(
    tmp_path: Path, story: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    monkeypatch.setattr(Console, "on_event", lambda self, event: 1 / 0)
    observers = Observers(observers_for(MonitorConfig(), folder, True))
    for event in story.run():
        observers.emit(event)
    observers.close()
    assert [row["step"] for row in read_metrics(folder.metrics)] == list(range(41))
    assert "generated" in folder.samples.read_text()
