"""A run reports the memory of the steps that it is asked for, and leaves the others alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from trainfleet.events import Event, Noted  # noqa: E402
from trainfleet.mesh import Mesh  # noqa: E402
from trainfleet.monitor import MemoryProfiler, RunFolder  # noqa: E402
from trainfleet.monitor.profiling.step_range import ProfileConfig, StepRange  # noqa: E402
from trainfleet.parallel import parallelize  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402
from trainfleet.training.trainer import Trainer  # noqa: E402
from trainfleet.training.watchers.memory_watch import MemoryWatch  # noqa: E402
from trainfleet.training.watchers.profile_watch import ProfileWatch  # noqa: E402


def run(folder: Path, *, steps: int, memory: str | None = None, profile: str | None = None, **more: Any) -> list[Event]:
    told: list[Event] = []

    class Told:
        on_event = staticmethod(told.append)

    batches = [torch.ones(4, 8) for _ in range(16)]
    with Mesh.from_env(Plan(), device="cpu") as mesh:
        model = parallelize(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()), mesh, Plan())
        files = RunFolder(folder)
        watchers: list[Any] = []
        if memory is not None:
            watchers.append(MemoryWatch(StepRange.parsed(memory, "memory"), files, mesh.world))
        if profile is not None:
            watchers.append(ProfileWatch(ProfileConfig(steps=profile, **more), files, mesh.world))
        optimizer = torch.optim.AdamW(model.parameters())
        loss_fn = lambda out, _: out.square().mean()  # noqa: E731
        Trainer(model, optimizer, loss_fn, batches, mesh=mesh, observers=[Told()], watchers=watchers).fit(steps)
    return told


def test_the_step_is_written_drawn_and_told(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = run(tmp_path, steps=4, memory="3")
    (note,) = [event for event in told if isinstance(event, Noted) and event.title == "memory"]
    assert note.step == 3 and note.text.startswith("peak ")
    report = json.loads((tmp_path / "memory" / "step_000003.json").read_text())
    assert report["step"] == 3 and report["modules"]["0"]["parameters"] == 4 * (8 * 8 + 8)
    assert {"forward", "backward", "optimizer"} <= set(report["phases"])
    assert [each["rank"] for each in report["ranks"]] == [0]
    assert "at the fullest moment of" in (tmp_path / "memory" / "step_000003.txt").read_text()
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_other_steps_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []
    for name in ("start", "look", "step", "stop"):
        whole = getattr(MemoryProfiler, name)
        monkeypatch.setattr(
            MemoryProfiler,
            name,
            lambda self, *args, name=name, whole=whole: (heard.append(name), whole(self, *args))[1],
        )
    run(tmp_path, steps=6, memory="3-4")
    assert heard == ["start", "look", "step", "look", "step", "stop"]
    assert not torch.autograd._profiler_enabled()


def test_a_run_that_ends_within_the_steps_reports_those_it_took_and_one_that_ends_before_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, steps=3, memory="2-9")
    assert (tmp_path / "memory" / "step_000003.json").is_file()
    with caplog.at_level(logging.WARNING):
        run(tmp_path, steps=2, memory="7")
    assert "asks for step 7, but this run ends after step 2" in caplog.text


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "memory").write_text("a file")
    (tmp_path / "profile").write_text("a file")
    told = run(tmp_path, steps=4, memory="1", profile="3")
    assert "cannot be written" in caplog.text and caplog.text.count("The run goes on") == 2
    assert [event.title for event in told if isinstance(event, Noted)] == ["memory"]


def test_another_profiler_is_left_to_its_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with torch.profiler.profile():
        run(tmp_path, steps=4, memory="1", profile="4")
    assert caplog.text.count("another profiler of torch runs") == 2
