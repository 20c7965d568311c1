"""A run traces the steps that it is asked for: trace, operators and memory, on the ranks that are asked."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from trainfleet.events import Event, Noted, StepEnded  # noqa: E402

_spec = importlib.util.spec_from_file_location("watched_run", Path(__file__).with_name("test_memory_watch.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
run = _module.run


def names_in(folder: Path) -> set[str]:
    trace = json.loads(gzip.decompress((folder / "profile" / "rank_0.json.gz").read_bytes()))
    return {event.get("name", "") for event in trace["traceEvents"]}


def phases_in(folder: Path, steps: int) -> dict[str, float]:
    """Seconds by phase, as operators.txt has them."""
    table = (folder / "profile" / "operators.txt").read_text().split("\n\n")[1]
    return {name: steps * float(ms) / 1000 for name, ms in map(str.split, table.splitlines()[1:])}


def test_the_steps_are_traced_and_agree_with_their_phases(tmp_path: Path) -> None:
    told: list[Event] = run(tmp_path, steps=6, profile="3-4")
    traced = phases_in(tmp_path, steps=2)
    assert {"phase: forward", "phase: backward", "phase: optimizer", "module: 0", "aten::addmm"} <= names_in(tmp_path)
    steps = [event for event in told if isinstance(event, StepEnded) and event.step in (3, 4)]
    for phase in ("forward", "backward", "optimizer"):
        assert traced[phase] == pytest.approx(sum(step.phases[phase] for step in steps), rel=0.1, abs=1e-3)
    table = (tmp_path / "profile" / "operators.txt").read_text()
    assert table.startswith("2 steps") and "aten::addmm" in table
    assert [event.step for event in told if isinstance(event, Noted) and event.title == "profile"] == [4]


def test_the_first_step_is_traced_without_warming_up_and_a_run_that_ends_early_writes_what_it_has(
    tmp_path: Path,
) -> None:
    run(tmp_path, steps=2, profile="1-9")
    assert (tmp_path / "profile" / "operators.txt").read_text().startswith("2 steps")


def test_a_rank_that_is_not_asked_writes_nothing(tmp_path: Path) -> None:
    run(tmp_path, steps=3, profile="2", ranks=(1,))
    assert not (tmp_path / "profile").exists()
