from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from trainfleet.config import load_config
from trainfleet.errors import ConfigError
from trainfleet.events import Observers
from trainfleet.monitor.alerts import Alert
from trainfleet.monitor.console import Console
from trainfleet.monitor.jsonl import read_metrics
from trainfleet.monitor.observers import MonitorConfig, observers_for, system_numbers
from trainfleet.monitor.run_folder import RunFolder
from trainfleet.monitor.services import PrometheusConfig, WandbConfig, mlflow, wandb


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


def test_alerts_come_last_and_functions_on_their_own(tmp_path: Path) -> None:
    config = MonitorConfig(console=False, alerts=("loss > 5", "json:loads", Alert(when="anomaly")))
    made = observers_for(config, None, True)
    assert names(made) == ["Alerts", "Alerts"] and [observer.in_loop for observer in made] == [True, False]
    assert names(observers_for(MonitorConfig(console=False, alerts="loss > 5"), None, True)) == ["Alerts"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"alerts": ("loss > 5", "loss >")}, "a number should follow >"),
        ({"observer_deadline_seconds": 0.0}, r"monitor\.observer_deadline_seconds is 0"),
        ({"prometheus": -1}, r"monitor\.prometheus\.port is -1"),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MonitorConfig(**fields)


def test_what_a_run_writes_down_holds_no_secrets() -> None:
    config = MonitorConfig(
        alerts=(Alert(when="loss > 5", webhook="https://a.example/hush"), "anomaly"), mlflow="https://me:hush@b.example"
    )
    assert "hush" not in repr(config.without_secrets()) and "a.example" in repr(config.without_secrets())
    assert MonitorConfig().without_secrets() == MonitorConfig()


def test_services_are_made_for_the_folder_and_one_without_its_library_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    for module in (wandb, mlflow):
        monkeypatch.setattr(module, "installed", lambda name: "1")
    off = {"console": False, "jsonl": False, "tensorboard": False, "curve": False}
    config = MonitorConfig(wandb="p", mlflow="x", prometheus=0, **off)
    assert names(observers_for(config, RunFolder(tmp_path), True)) == ["Samples", "WandB", "Mlflow"]
    assert "trainfleet[prometheus]" in caplog.text
    assert names(observers_for(config, None, True)) == []


def test_a_rank_reports_of_its_machine_unless_told_not_to(tmp_path: Path) -> None:
    assert system_numbers(MonitorConfig(system=False), tmp_path, device="cpu", is_first_of_host=True) is None
    first = system_numbers(MonitorConfig(), tmp_path, device="cpu", is_first_of_host=True)
    other = system_numbers(MonitorConfig(), tmp_path, device="cpu", is_first_of_host=False)
    assert first is not None and other is not None
    assert "memory_total_bytes" in first() and "memory_total_bytes" not in other()
    assert "process_memory_bytes" in other()


def test_short_forms_and_sections_come_from_a_recipe() -> None:
    values = {
        "alerts": ["loss > 5 for 20 steps", {"when": "anomaly", "command": "./page.sh"}],
        "wandb": {"project": "p", "mode": "offline"},
        "mlflow": "sqlite:///runs.db",
        "prometheus": 9400,
    }
    config = load_config(MonitorConfig, values=values).value
    assert [alert.when for alert in config.each_alert] == ["loss > 5 for 20 steps", "anomaly"]
    assert config.each_alert[1].command == "./page.sh" and config.prometheus == 9400
    assert config.wandb == WandbConfig(project="p", mode="offline")
    assert load_config(MonitorConfig, values={"prometheus": {"port": 0}}).value.prometheus == PrometheusConfig(port=0)
    with pytest.raises(ConfigError):
        load_config(MonitorConfig, values={"alerts": [{"when": "loss > 5", "comand": "x"}]})
