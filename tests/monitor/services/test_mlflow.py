from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trainfleet.errors import DependencyError
from trainfleet.events import AlertFired, AnomalySeen, Event, Noted, RunEnded, Tracked
from trainfleet.monitor.services import mlflow as service
from trainfleet.monitor.services.mlflow import Mlflow, MlflowConfig

END = RunEnded(step=3, reason="finished", seconds=1.0, summary={"validation loss": 2.0})


class MlflowException(Exception):
    error_code = "RESOURCE_DOES_NOT_EXIST"


class Server:
    """As much of MLflow's client as we use, over what a server would hold."""

    def __init__(self) -> None:
        self.runs: dict[str, Any] = {}
        self.calls: list[str] = []
        self.hangs = threading.Event()
        self.hangs.set()

    def __call__(self, tracking_uri: str | None) -> Server:
        self.hangs.wait(30)
        self.uri = tracking_uri
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return None if not self.runs else SimpleNamespace(experiment_id="7")

    def create_experiment(self, name: str) -> str:
        return "7"

    def create_run(self, experiment_id: str, run_name: str) -> Any:
        name = f"run{len(self.runs)}"
        self.runs[name] = {"name": run_name, "status": "RUNNING", "metrics": [], "params": {}, "tags": {}}
        return SimpleNamespace(info=SimpleNamespace(run_id=name))

    def get_run(self, run: str) -> Any:
        if run not in self.runs:
            raise MlflowException(run)
        return self.runs[run]

    def update_run(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status

    def set_terminated(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status

    def set_tag(self, run: str, name: str, value: str) -> None:
        self.runs[run]["tags"][name] = value

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) <= 1000 and len(params) <= 100
        self.runs[run]["metrics"] += metrics
        self.runs[run]["params"] |= dict(params)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    entities = ModuleType("mlflow.entities")
    entities.Metric = lambda *parts: parts  # type: ignore[attr-defined]
    entities.Param = lambda *parts: parts  # type: ignore[attr-defined]
    tracking, exceptions = ModuleType("mlflow.tracking"), ModuleType("mlflow.exceptions")
    tracking.MlflowClient = server  # type: ignore[attr-defined]
    exceptions.MlflowException = MlflowException  # type: ignore[attr-defined]
    for module in (ModuleType("mlflow"), entities, tracking, exceptions):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(service, "installed", lambda name: "3.17")
    return server


def sent(folder: Path, *events: Event, config: MlflowConfig | str = "http://x", every: int = 1) -> None:
    observer = Mlflow(config, folder=folder, every=every)
    for event in events:
        observer.on_event(event)
    observer.close()


def test_a_run_is_sent_with_its_recipe_its_numbers_and_its_end(server: Server, tmp_path: Path, story: Any) -> None:
    recipe = {"train": {"steps": 40, "none": None}, **{f"k{n}": n for n in range(150)}}
    events = [story.started(recipe=recipe), *[story.step(n, loss=float(n)) for n in range(1, 401)]]
    events += [Tracked(step=3, name="top 5*", value=7.0), AlertFired(step=3, alert="a", value=9.0, text="loss is 9")]
    events += [
        AnomalySeen(step=3, kind="slow_rank", what="rank 1", policy="warn"),
        Noted(step=3, title="sample", text="x"),
    ]
    sent(tmp_path / "small", *events, END, every=2)
    (run,) = server.runs.values()
    assert server.uri == "http://x" and run["name"] == "small" and run["status"] == "FINISHED"
    losses = [(step, value) for name, value, _, step in run["metrics"] if name == "train/loss"]
    assert losses == [(n, float(n)) for n in range(2, 401, 2)]
    assert ("top 5_", 7.0, 3) in [(name, value, step) for name, value, _, step in run["metrics"]]
    assert run["params"]["train.steps"] == "40" and run["params"]["k149"] == "149" and "train.none" not in run["params"]
    assert run["tags"] == {
        "alert": "step 3: loss is 9",
        "anomaly/slow_rank": "step 3: rank 1",
        "sample": "x",
        "summary/validation loss": "2.0",
    }


def test_a_resumed_run_goes_on_as_the_same_run_there(server: Server, tmp_path: Path, story: Any) -> None:
    for step in (1, 2):
        sent(tmp_path, story.started(), story.step(step))
    (run,) = server.runs.values()
    assert [step for name, _, _, step in run["metrics"] if name == "train/loss"] == [1, 2]


def test_a_run_that_the_server_has_no_more_is_begun_anew(server: Server, tmp_path: Path, story: Any) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "run_id").write_text("lost\n")
    sent(tmp_path, story.started(), story.step(1), RunEnded(step=1, reason="the loss is nan", seconds=1.0))
    assert [run["status"] for run in server.runs.values()] == ["FAILED"]
    assert (tmp_path / "mlflow" / "run_id").read_text() == "run0\n"


def test_a_server_that_never_answers_costs_what_was_sent_and_no_more(
    server: Server, tmp_path: Path, story: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.hangs.clear()
    monkeypatch.setattr(service, "CLOSE_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING, logger="trainfleet"):
        sent(tmp_path, story.started(), story.step(1))
    assert caplog.messages == ["MLflow: 2 were lost in all."]
    server.hangs.set()


def test_a_password_is_not_written_down() -> None:
    assert MlflowConfig(uri="https://me:hush@host/x").without_secrets().uri == "https://host/x"
    assert MlflowConfig(uri="sqlite:///a.db").without_secrets().uri == "sqlite:///a.db"


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "installed", lambda name: None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(DependencyError, match=r'pip install "trainfleet\[mlflow\]"'):
        Mlflow("x", folder=tmp_path)


def test_the_library_itself_takes_it(tmp_path: Path, story: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = f"file:{tmp_path}/store"
    for start in (0, 20):
        sent(tmp_path / "run", *story.run(start + 1, start + 20), config=store)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("trainfleet")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["train.steps"] == "40"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == list(range(1, 41))
