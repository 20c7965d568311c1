from __future__ import annotations

import importlib.util
import math
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from trainfleet.errors import DependencyError
from trainfleet.events import Evaluated, RunEnded
from trainfleet.monitor import curve as module
from trainfleet.monitor.curve import LossCurve, draw_curve
from trainfleet.monitor.jsonl import JsonLines

needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is missing")


def size_of(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])  # type: ignore[return-value]


@needs_matplotlib
def test_the_end_of_a_run_leaves_a_picture(tmp_path: Path, story: Any) -> None:
    curve = LossCurve(tmp_path / "loss.png")
    for event in story.run():
        curve.on_event(event)
    width, height = size_of(tmp_path / "loss.png")
    assert 800 < width < 2000 and 500 < height < 1500
    assert 10_000 < (tmp_path / "loss.png").stat().st_size < 400_000
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    assert "pyplot" not in " ".join(sys.modules)


@needs_matplotlib
@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0, -1.0, 1e30])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_odd_losses_still_make_a_picture(tmp_path: Path, story: Any, loss: float, count: int) -> None:
    curve = LossCurve(tmp_path / "loss.png")
    curve.on_event(story.started())
    for step in range(1, count + 1):
        curve.on_event(story.step(step, loss=loss))
    curve.on_event(RunEnded(step=count, reason="finished", seconds=1.0, summary={"baseline/odd": loss}))
    size_of(tmp_path / "loss.png")


@needs_matplotlib
def test_the_picture_holds_training_validation_baselines_and_rate() -> None:
    rows = [{"step": step, "loss": 5.0 / step, "learning_rate": 0.1} for step in range(1, 21)]
    rows[9]["validation_loss"] = 0.75
    figure = draw_curve(rows, baselines={"unigram": 3.29}, title="small")
    loss_axes, rate_axes = figure.axes
    assert loss_axes.get_yscale() == "log" and loss_axes.get_title(loc="left") == "small"
    legend = loss_axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()][2] == "validation: 0.75"
    assert [text.get_text() for text in loss_axes.texts] == ["unigram 3.29"]
    assert list(rate_axes.lines[0].get_ydata()) == [0.1] * 20


@needs_matplotlib
def test_a_resumed_run_shows_earlier_steps_too(tmp_path: Path, story: Any) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    for event in story.run(1, 20):
        log.on_event(event)
    curve = LossCurve(tmp_path / "loss.png")
    for event in story.run(15, 30):  # from the checkpoint of step 14
        log.on_event(event)
        curve.on_event(event)
    log.close()
    assert sorted(curve._rows) == list(range(31)) and curve._baselines == {"unigram": 3.29, "trigram": 1.87}


@needs_matplotlib
def test_drawing_takes_at_most_its_share_of_the_run(
    tmp_path: Path, story: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    drawn = []

    def write(*_: Any) -> None:
        drawn.append(clock[0])
        clock[0] += 0.5

    monkeypatch.setattr(module, "draw_curve", lambda *_, **__: None)
    monkeypatch.setattr(module, "write_png", write)
    curve = LossCurve(tmp_path / "loss.png")
    curve.on_event(story.started())
    for step in range(1, 601):  # an evaluation a second
        clock[0] = max(clock[0], float(step))
        curve.on_event(Evaluated(step=step, loss=1.0))
    assert 9 <= len(drawn) <= 12 and len(drawn) * 0.5 <= 0.01 * clock[0]


@needs_matplotlib
def test_thousands_of_baselines_are_a_few_and_their_number() -> None:
    figure = draw_curve([], baselines={f"b{n}": 1.0 + n for n in range(5000)}, title="many")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len(texts) == module.MAX_BASELINES and texts[0] == "b0 1"
    assert texts[-1] == "b7 8, and 4,992 above it that are not shown"


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r'pip install "trainfleet\[monitor\]"'):
        LossCurve(tmp_path / "loss.png")
