"""The report of a step that was thought out, number by number."""

from __future__ import annotations

import json
from typing import Any

from trainfleet.monitor.profiling.allocations import Block, Range
from trainfleet.monitor.profiling.growth import Growth
from trainfleet.monitor.profiling.holdings import Holding
from trainfleet.monitor.profiling.memory_report import MemoryReport, report_of

PHASES = [Range("forward", 10, 20), Range("backward", 20, 30)]


def holding(kind: str, module: str, size: int, made: int, freed: int | None, device: str = "cpu") -> Holding:
    return Holding(Block(device, made, size, made, freed), kind, ((module, size),), "")


def report(**more: Any) -> MemoryReport:
    found = [
        holding("parameters", "blocks.0", 1000, 0, None),
        holding("parameters", "blocks.1", 1000, 0, None),
        holding("activations", "blocks.0", 300, 12, 28),
        holding("activations", "blocks.1", 500, 14, 22),
        holding("temporary", "", 50, 21, 23),
        holding("gradients", "blocks.1", 1000, 24, 29),
        holding("other", "", 70, 13, 15, "cuda:0"),
    ]
    known = {"step": 3, "rank": 0, "growth": Growth()}
    return report_of(found, PHASES, begin=5, end=40, device="cpu", **{**known, **more})


def test_the_peak_and_what_held_it() -> None:
    found = report()
    assert (found.begin_bytes, found.peak_bytes, found.end_bytes) == (2000, 3300, 2000)
    assert found.peak_phase == "backward"
    assert found.peak_holders[0][2] == 1000 and sum(size for *_, size in found.peak_holders) == 3300
    assert found.other_device_bytes == {"cuda:0": 70}


def test_each_phase_at_its_fullest_moment_and_each_module() -> None:
    found = report()
    assert found.phases["forward"] == {"parameters": 2000, "activations": 800}
    assert found.phases["backward"] == {"parameters": 2000, "gradients": 1000, "activations": 300}
    assert found.modules == {
        "blocks.0": {"parameters": 1000, "activations": 300},
        "blocks.1": {"parameters": 1000, "activations": 500, "gradients": 1000},
    }


def test_the_text_gathers_modules_that_differ_by_number_and_the_json_is_strict() -> None:
    text = str(report(reserved_bytes=4000))
    assert "blocks.*  x2" in text and "cache 700 B" in text
    assert json.loads(json.dumps(report().to_json(), allow_nan=False))["peak_bytes"] == 3300


def test_the_timeline_keeps_the_peak_however_far_it_is_thinned(monkeypatch: Any) -> None:
    monkeypatch.setattr("trainfleet.monitor.profiling.memory_report.MAX_POINTS", 2)
    line = report().timeline
    assert len(line.seconds) <= 4
    assert max(sum(values) for values in zip(*line.bytes.values())) == 3300
