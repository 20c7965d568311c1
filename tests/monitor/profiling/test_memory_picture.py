from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from trainfleet.monitor.profiling.growth import Growth
from trainfleet.monitor.profiling.holdings import KINDS
from trainfleet.monitor.profiling.memory_picture import COLORS, draw_memory, write_memory_picture
from trainfleet.monitor.profiling.memory_report import MemoryReport, Timeline


def report(**more: object) -> MemoryReport:
    line = Timeline(
        seconds=(0.0, 1.0, 2.0),
        bytes={"parameters": (10, 10, 10), "activations": (0, 20, 0)},
        phases=(("forward", 0.0, 1.0), ("backward", 1.0, 2.0)),
    )
    known = {
        "step": 3, "rank": 0, "device": "cpu", "begin_bytes": 10, "end_bytes": 10, "peak_bytes": 30,
        "peak_phase": "forward", "peak_holders": (), "phases": {}, "modules": {}, "growth": Growth(), "timeline": line,
    }  # fmt: skip
    return MemoryReport(**{**known, **more})


def test_kinds_are_stacked_in_order_phases_named_and_the_peak_marked() -> None:
    figure = draw_memory(report())
    (axes,) = figure.axes
    texts = {text.get_text() for text in axes.texts}
    assert {"forward", "backward", "peak 30 B"} <= texts
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["activations", "parameters"]
    assert set(COLORS) == set(KINDS)


def test_the_picture_is_written_wholly_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "memory.png"
    write_memory_picture(report(), path)
    assert path.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [path]
    write_memory_picture(
        report(timeline=Timeline(seconds=(0.0,), bytes={"other": (0,)}, phases=()), peak_bytes=0), path
    )
