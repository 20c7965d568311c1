"""A trace loads as JSON, and names phases, modules and operators."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from trainfleet.errors import StoreError  # noqa: E402
from trainfleet.monitor.profiling.profile import Profile  # noqa: E402
from trainfleet.stopwatch import Stopwatch, timed  # noqa: E402


def test_phases_modules_and_operators_are_in_the_trace_and_agree_with_the_stopwatch(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU())
    profile = Profile(model)
    with Stopwatch() as watch:
        profile.start(warm_up=True)
        seconds: list[dict[str, float]] = []
        for _ in range(3):
            watch.take()
            with timed("forward"):
                loss = sum(model(torch.ones(256, 64)).sum() for _ in range(30))
            with timed("backward"):
                loss.backward()
            seconds.append(watch.take())
            profile.step()
        assert profile.stop()
    profile.write(tmp_path / "rank_0.json.gz")
    events = json.loads(gzip.decompress((tmp_path / "rank_0.json.gz").read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"phase: forward", "phase: backward", "module: 0", "module: 1", "aten::addmm"} <= names
    for phase in ("forward", "backward"):
        traced = sum(event["dur"] for event in events if event.get("name") == f"phase: {phase}") / 1e6
        assert traced == pytest.approx(sum(each[phase] for each in seconds[1:]), rel=0.1)
    assert sum(event.get("name") == "phase: forward" for event in events) == 2  # the first warmed up
    table = profile.operators()
    assert table.startswith("2 steps") and "aten::addmm" in table and "module (forward)" in table


def test_one_that_is_ended_while_it_warms_up_recorded_nothing_and_frees_the_profiler() -> None:
    profile = Profile()
    profile.start(warm_up=True)
    assert not profile.stop()
    again = Profile()
    again.start(warm_up=False)
    assert again.stop()
    assert "1 step;" in again.operators()


def test_a_disk_that_is_full_is_an_error_and_leaves_no_half_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = Profile()
    profile.start(warm_up=False)
    torch.ones(3) + 1
    profile.stop()
    (tmp_path / "rank_0.json.gz").mkdir()
    with pytest.raises(StoreError, match=r"rank_0\.json\.gz cannot be written: "):
        profile.write(tmp_path / "rank_0.json.gz")
    with monkeypatch.context() as full:
        full.setattr(profile._profiler, "export_chrome_trace", lambda path: None)
        with pytest.raises(StoreError, match="torch could not export it"):
            profile.write(tmp_path / "rank_1.json.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["rank_0.json.gz"]
