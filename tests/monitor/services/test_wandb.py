from __future__ import annotations

import logging
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trainfleet.errors import DependencyError
from trainfleet.events import AlertFired, AnomalySeen, Evaluated, Event, Noted, RunEnded, SamplesSkipped, Tracked
from trainfleet.monitor.services import wandb as service
from trainfleet.monitor.services.wandb import WandB, WandbConfig, run_id


class Library(ModuleType):
    """As much of W&B as we use; it remembers what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.alerts: list[str] = []
        self.summary: dict[str, Any] = {}
        self.ended: list[int] = []
        self.unreachable = False
        self.hangs = threading.Event()
        self.hangs.set()

    def init(self, **fields: Any) -> Any:
        self.hangs.wait(30)
        if self.unreachable and fields["mode"] != "offline":
            raise ConnectionError("nobody\nis there")
        self.inits.append(fields)
        return SimpleNamespace(
            define_metric=lambda *args, **kwargs: None,
            log=self.logged.append,
            alert=lambda title, text: self.alerts.append(f"{title}: {text}"),
            finish=lambda exit_code: self.ended.append(exit_code),
            summary=self.summary,
        )

    def teardown(self, exit_code: int) -> None:
        self.logged.clear()

    @staticmethod
    def Settings(**fields: Any) -> dict[str, Any]:
        return fields

    @staticmethod
    def Html(text: str) -> str:
        return text


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.setattr(service, "installed", lambda name: "0.31")
    return library


def sent(config: WandbConfig | str, folder: Path, *events: Event, every: int = 1) -> None:
    observer = WandB(config, folder=folder, every=every)
    for event in events:
        observer.on_event(event)
    observer.close()


END = RunEnded(step=3, reason="finished", seconds=1.0, summary={"validation loss": 2.0})


def test_a_run_is_sent_with_its_recipe_its_numbers_and_its_end(library: Library, tmp_path: Path, story: Any) -> None:
    events = [story.started(), *[story.step(n, loss=float(n)) for n in (1, 2, 3)], SamplesSkipped(count=1, example="x")]
    events += [Evaluated(step=2, loss=4.0), Tracked(step=3, name="mine", value=7.0)]
    events += [
        AlertFired(step=3, alert="loss > 5", value=9.0, text="loss is 9"),
        Noted(step=3, title="sample", text="a<b"),
    ]
    events += [AnomalySeen(step=3, kind="slow_rank", what="rank 1", policy="warn"), END]
    sent("project", tmp_path / "small", *events, every=2)
    (init,) = library.inits
    assert init["project"] == "project" and init["name"] == "small" and init["resume"] == "allow"
    assert init["config"]["train"] == {"steps": 40} and init["mode"] is None
    assert [row["train/loss"] for row in library.logged if "train/loss" in row] == [2.0]
    assert {"step": 2, "validation/loss": 4.0} in library.logged and {"step": 3, "mine": 7.0} in library.logged
    assert {"step": 3, "sample": "<pre>a&lt;b</pre>"} in library.logged
    assert library.alerts == ["loss > 5: loss is 9", "slow_rank: rank 1"]
    assert library.summary == {"validation loss": 2.0, "reason": "finished"} and library.ended == [0]


def test_a_resumed_run_goes_on_as_the_same_run_there(library: Library, tmp_path: Path, story: Any) -> None:
    for _ in range(2):
        sent(WandbConfig(), tmp_path, story.started(), story.step(1))
    first, second = (init["id"] for init in library.inits)
    assert first == second == run_id(tmp_path) == (tmp_path / "wandb" / "run_id").read_text().strip()
    assert run_id(tmp_path / "other") != first


def test_an_id_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run_id").write_text("../..\n")
    assert run_id(tmp_path).isalnum()


def test_where_nobody_is_reached_the_run_is_written_beside(
    library: Library, tmp_path: Path, story: Any, caplog: pytest.LogCaptureFixture
) -> None:
    library.unreachable = True
    sent("p", tmp_path, story.started(), story.step(1), END)
    (init,) = library.inits
    assert init["mode"] == "offline" and len(library.logged) == 1 and library.ended == [0]
    (message,) = caplog.messages
    assert message.startswith("Weights & Biases did not begin the run: nobody is there. It is written to ")


def test_one_that_never_answers_costs_the_loop_nothing_and_is_left_behind(
    library: Library, tmp_path: Path, story: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.hangs.clear()
    monkeypatch.setattr(service, "CLOSE_SECONDS", 0.2)
    observer = WandB("p", folder=tmp_path)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="trainfleet"):
        for event in (story.started(), *[story.step(n) for n in range(1, 20_000)]):
            observer.on_event(event)
        assert time.monotonic() - began < 5
        observer.close()
    assert [message.partition(":")[0] for message in caplog.messages] == ["Weights & Biases"] * 2
    assert "10000 wait already" in caplog.messages[0] and "20000 were lost in all" in caplog.messages[1]
    library.hangs.set()


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "installed", lambda name: None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(DependencyError, match=r'pip install "trainfleet\[wandb\]"'):
        WandB("p", folder=tmp_path)


def test_the_library_itself_takes_it_offline(tmp_path: Path, story: Any) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    sent(WandbConfig(mode="offline", project="p"), tmp_path / "run", *story.run())
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert written.stem == f"run-{run_id(tmp_path / 'run')}" and written.stat().st_size > 1000
