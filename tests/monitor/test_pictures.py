"""What the pictures show are the numbers of the run, as `read_metrics` gives them.

The run is a short one, trained here. With TRAINFLEET_RUN=FOLDER it is that one, and with TRAINFLEET_PICTURES=FOLDER the
pictures are left there: so come those in docs/pictures, from a run of `make train`.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from trainfleet.monitor.drawing import COLORS, write_png
from trainfleet.monitor.history import History, read_run
from trainfleet.monitor.jsonl import JsonLines, read_metrics
from trainfleet.monitor.limit import COMPUTING
from trainfleet.monitor.pictures import MAX_BARS, MAX_RUNS, draw_pictures, names_of
from trainfleet.stopwatch import PRODUCTIVE

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("TRAINFLEET_RUN"):
        return Path(given)
    torch = pytest.importorskip("torch", reason="a run is trained")
    from trainfleet import train

    folder = tmp_path_factory.mktemp("runs") / "small"
    x = torch.randn(320, 8, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    quiet = {"console": False, "tensorboard": False, "curve": False, "log_interval": 4}
    settings = {"batch_size": 16, "learning_rate": 0.05, "save_dir": str(folder), "monitor": quiet}
    settings |= {"train": {"steps": 12, "evaluate_every": 5}, "data": {"evaluation": {"fraction": 0.2}}}
    train(torch.nn.Linear(8, 2), data, settings)
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def run(folder: Path) -> History:
    return read_run(folder)


@pytest.fixture(scope="module")
def pictures(run: History) -> dict[str, Any]:
    return draw_pictures([run])


def drawn(line: Any) -> tuple[list[float], list[float]]:
    return list(line.get_xdata()), list(line.get_ydata())


def test_the_loss_is_that_of_each_step_and_each_evaluation(pictures: Any, rows: list[dict[str, Any]]) -> None:
    loss_axes, rate_axes = pictures["loss"].axes
    assert drawn(loss_axes.lines[0]) == ([row["step"] for row in rows], [row["loss"] for row in rows])
    evaluated = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    assert len(evaluated) >= 2 and list(zip(*drawn(loss_axes.lines[2]))) == evaluated
    assert drawn(rate_axes.lines[0])[1] == [row["learning_rate"] for row in rows]


def test_the_throughput_is_tokens_by_seconds_and_the_share_that_waited(
    pictures: Any, rows: list[dict[str, Any]]
) -> None:
    speed_axes, wait_axes = pictures["throughput"].axes
    assert drawn(speed_axes.lines[0]) == (
        [row["step"] for row in rows],
        [row["tokens"] / row["seconds"] for row in rows],
    )
    shares = [100 * row["data_seconds"] / row["seconds"] for row in rows]
    assert drawn(wait_axes.lines[0])[1] == pytest.approx(shares)


def test_the_memory_is_that_of_each_step(pictures: Any, rows: list[dict[str, Any]]) -> None:
    (axes,) = pictures["memory"].axes
    assert drawn(axes.lines[0]) == ([row["step"] for row in rows], [row["memory_bytes"] for row in rows])


def test_the_phases_are_stacked_to_the_time_of_each_step(pictures: Any, rows: list[dict[str, Any]]) -> None:
    step_axes, _ = pictures["time"].axes
    stacks = {patch.get_label(): patch.get_data() for patch in step_axes.patches}
    assert stacks.keys() == rows[0]["phases"].keys()
    for phase, (above, edges, below) in stacks.items():
        seconds = (above - below) * (edges[1:] - edges[:-1])
        assert seconds.sum() == pytest.approx(sum(row["phases"][phase] for row in rows), abs=1e-9)
        if len(rows) <= MAX_BARS:
            assert list(seconds) == pytest.approx([row["phases"][phase] for row in rows], abs=1e-9)
    highest = max((above for above, _, _ in stacks.values()), key=lambda above: above.sum())
    if len(rows) <= MAX_BARS:
        whole = [row["between_seconds"] + row["seconds"] for row in rows]
        assert list(highest) == pytest.approx(whole, rel=1e-6), "the phases add up to the time"


def test_the_bar_is_the_whole_wall_time_and_its_share_that_counts(pictures: Any, run: History) -> None:
    _, bar_axes = pictures["time"].axes
    widths = {bars.get_label(): bars.patches[0].get_width() for bars in bar_axes.containers}
    assert sum(widths.values()) == pytest.approx(run.goodput.seconds)
    share = sum(widths.get(name, 0.0) for name in (*PRODUCTIVE, COMPUTING)) / run.goodput.seconds
    assert bar_axes.get_xlabel().endswith(f"goodput {100 * share:.0f}%")
    rows = [row["time"] for row in read_metrics(run.folder / "metrics.jsonl")]
    assert run.goodput.seconds >= rows[-1] - rows[0]


def test_the_pictures_are_left_where_they_are_asked_for(pictures: Any, tmp_path: Path) -> None:
    folder = Path(os.environ.get("TRAINFLEET_PICTURES") or tmp_path)
    for name, figure in pictures.items():
        write_png(figure, folder / f"{name}.png")
        png = (folder / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        assert 1000 < width < 1400 and 500 < height < 900 and 10_000 < len(png) < 400_000
    assert set(pictures) == {"loss", "throughput", "memory", "time"}


def write(folder: Path, *events: Any) -> History:
    log = JsonLines(folder / "metrics.jsonl")
    for event in events:
        log.on_event(event)
    log.close()
    return read_run(folder)


def test_several_runs_lie_over_one_another_each_in_its_colour(tmp_path: Path, story: Any) -> None:
    runs = [write(tmp_path / name / "run", *story.run(1, last)) for name, last in (("a", 20), ("b", 30))]
    assert names_of(runs) == [str(tmp_path / name / "run") for name in "ab"], "one name would say nothing"
    pictures = draw_pictures(runs)
    for name in ("loss", "throughput", "memory"):
        lines = [line for line in pictures[name].axes[0].lines if len(line.get_xdata()) > 2]
        by_color = {color: drawn(line) for line in lines for color in [line.get_color()]}
        assert {color: points[0][-1] for color, points in by_color.items()} == {COLORS[0]: 20, COLORS[1]: 30}
    bars = pictures["time"].axes[1].containers
    assert [len(bar.patches) for bar in bars] == [2, 2], "data and computing of both"
    assert sum(bar.patches[0].get_width() for bar in bars) == pytest.approx(0.1)


def test_more_runs_than_colours_are_the_first_of_them(tmp_path: Path, story: Any) -> None:
    runs = [write(tmp_path / f"r{n}", *story.run(1, 5)) for n in range(MAX_RUNS + 3)]
    assert draw_pictures(runs)["loss"].axes[0].get_title(loc="left") == f"{MAX_RUNS} runs"


@pytest.mark.parametrize(("steps", "number_of_runs"), [(0, 1), (1, 1), (0, 2), (2, 2)])
def test_runs_with_odd_numbers_or_none_still_make_pictures(
    tmp_path: Path, story: Any, steps: int, number_of_runs: int
) -> None:
    events = [story.step(n, loss=math.nan, seconds=0.0, tokens=0, memory_bytes=0) for n in range(1, steps + 1)]
    run = write(tmp_path / "odd", story.started(), *events)
    pictures = draw_pictures([run] * number_of_runs)
    for name, figure in pictures.items():
        write_png(figure, tmp_path / f"{name}.png")
    title = pictures["loss"].axes[0].get_title(loc="left")
    assert ("not finite" in title) == (steps > 0 and number_of_runs == 1)


def test_an_evaluation_does_not_flatten_the_steps(tmp_path: Path, story: Any) -> None:
    steps = [story.step(n, phases={"forward": 0.1, "evaluation": 5.0 * (n == 10)}) for n in range(1, 21)]
    axes = draw_pictures([write(tmp_path, story.started(), *steps)])["time"].axes[0]
    assert axes.get_ylim()[1] < 0.2 and [text.get_text() for text in axes.texts] == ["5.1 s"]


def test_long_runs_are_drawn_in_few_points_and_few_stacks(tmp_path: Path, story: Any) -> None:
    pictures = draw_pictures([write(tmp_path, story.started(), *[story.step(n) for n in range(1, 6001)])])
    assert len(pictures["loss"].axes[0].lines[0].get_xdata()) == 3000
    assert "means of 2 steps" in pictures["loss"].axes[0].get_legend().get_texts()[0].get_text()
    assert len(pictures["time"].axes[0].patches[0].get_data()[0]) <= MAX_BARS
