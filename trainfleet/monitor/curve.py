"""The loss of a run as a picture: training, validation, baselines, and the learning rate below."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainfleet.deps import installed, require
from trainfleet.events import Evaluated, Event, RunEnded, RunStarted, StepEnded, Tracked
from trainfleet.monitor.jsonl import read_metrics
from trainfleet.monitor.progress import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SHARE = 0.01
"""Of the run's time that drawing may take; the last picture is drawn in any case."""
FIRST_DRAWING_SECONDS = 1.5
"""What the first picture is expected to take: matplotlib has to be imported for it."""
MAX_POINTS = 4000
"""More points than a picture has columns cost time and show nothing."""

INK, GRAY, BLUE, ORANGE, GREEN = "#333333", "#8a8a8a", "#3b6fb6", "#d9662b", "#4b8b3b"


class LossCurve:
    """Draws `path` (a PNG) at evaluations and at the end.

    A resumed run shows the earlier points too, read from `history` (what JsonLines writes; by default
    `metrics.jsonl` beside the picture) if it is there.
    """

    in_loop = True

    def __init__(self, path: str | Path, *, history: str | Path | None = None) -> None:
        if installed("matplotlib") is None:  # importing it waits for the first picture
            require("matplotlib", "monitor", purpose="The picture of the loss")
        self.path = Path(path)
        self._history = self.path.with_name("metrics.jsonl") if history is None else Path(history)
        self._rows: dict[int, dict[str, Any]] = {}
        self._baselines: dict[str, float] = {}
        self._title = ""
        self._started_at = time.monotonic()
        self._drawing_seconds = 0.0
        self._last_drawing_seconds = FIRST_DRAWING_SECONDS

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepEnded):
            self._rows.setdefault(event.step, {}).update(loss=event.loss, learning_rate=event.learning_rate)
        elif isinstance(event, Evaluated):
            self._rows.setdefault(event.step, {})["validation_loss"] = event.loss
            if self._may_draw():
                self.draw()
        elif isinstance(event, Tracked):
            if event.name.startswith(BASELINE):
                self._baselines[event.name.removeprefix(BASELINE)] = event.value
        elif isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, RunEnded):
            for name, value in event.summary.items():
                if name.startswith(BASELINE) and isinstance(value, (int, float)):
                    self._baselines[name.removeprefix(BASELINE)] = value
            if not event.lost_peer:
                self.draw()

    def draw(self) -> None:
        """Put the picture in place of the older one, wholly or not at all."""
        started = time.monotonic()
        rows = [{"step": step, **self._rows[step]} for step in sorted(self._rows)]
        figure = draw_curve(rows, baselines=self._baselines, title=self._title)
        unfinished = self.path.with_name(f".{self.path.name}.unfinished")
        try:
            figure.savefig(unfinished, format="png", dpi=130)
            unfinished.replace(self.path)
        finally:
            unfinished.unlink(missing_ok=True)
        self._last_drawing_seconds = time.monotonic() - started
        self._drawing_seconds += self._last_drawing_seconds

    def _may_draw(self) -> bool:
        allowed = MAX_SHARE * (time.monotonic() - self._started_at)
        return self._drawing_seconds + self._last_drawing_seconds <= allowed

    def _start(self, event: RunStarted) -> None:
        self._started_at = time.monotonic()
        self._drawing_seconds = 0.0
        self._baselines = {}
        self._rows = {}
        name = Path(event.folder).name if event.folder else "loss"
        self._title = ", ".join(filter(None, (f"{name}   {event.parameters:,} parameters", event.plan)))
        if event.start_step and self._history.is_file():
            rows = read_metrics(self._history)
            self._rows = {row["step"]: row for row in rows if row["step"] <= event.start_step}
            for row in rows:
                marks = {name: value for name, value in row.items() if name.startswith(BASELINE)}
                self._baselines.update({name.removeprefix(BASELINE): value for name, value in marks.items()})


def draw_curve(rows: Sequence[dict[str, Any]], *, baselines: dict[str, float], title: str) -> Figure:
    """Rows as `read_metrics` gives them: `step`, `loss`, `learning_rate`, `validation_loss`, each where it is known."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 1, height_ratios=(5, 1))
    loss_axes = figure.add_subplot(grid[0])
    rate_axes = figure.add_subplot(grid[1], sharex=loss_axes)
    loss_axes.set_title(title, loc="left", fontsize=10, color=INK)
    _draw_loss(loss_axes, rows, baselines)
    rates = _series(rows, "learning_rate")
    rate_axes.plot(*rates, color=GREEN, linewidth=1.2)
    rate_axes.set_ylabel("learning rate", fontsize=9, color=INK)
    rate_axes.set_ylim(bottom=0)
    rate_axes.set_xlabel("step", fontsize=9, color=INK)
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    rate_axes.yaxis.get_offset_text().set_fontsize(7)
    rate_axes.locator_params(axis="y", nbins=2)
    for axes in (loss_axes, rate_axes):
        _make_calm(axes)
    loss_axes.tick_params(labelbottom=False)
    return figure


def _draw_loss(axes: Axes, rows: Sequence[dict[str, Any]], baselines: dict[str, float]) -> None:
    steps, losses = _series(rows, "loss")
    shown = losses
    if steps:
        smoothed = _smooth(losses)
        axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8, label="training, each step")
        axes.plot(steps, smoothed, color=BLUE, linewidth=1.8, label=f"training, smoothed: {smoothed[-1]:.4g}")
    at, validation = _series(rows, "validation_loss")
    if at:
        axes.plot(
            at, validation, "o-", color=ORANGE, markersize=4, linewidth=1, label=f"validation: {validation[-1]:.4g}"
        )
    known = {name: value for name, value in baselines.items() if math.isfinite(value)}
    for name, value in known.items():
        axes.axhline(value, color=GRAY, linestyle="--", linewidth=1)
        axes.annotate(
            f"{name} {value:.4g}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=GRAY,
        )
    shown = [*losses, *validation, *known.values()]
    if shown and min(shown) > 0 and max(shown) > 2.5 * min(shown):
        _use_log_scale(axes, shown)
    axes.set_ylabel("loss", fontsize=9, color=INK)
    if steps or at:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")


def _use_log_scale(axes: Axes, shown: Sequence[float]) -> None:
    """A fall from 5.5 to 1.6 shows its end; the ticks stay ordinary numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    is_narrow = max(shown) < 30 * min(shown)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if is_narrow else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _make_calm(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRAY)
    axes.tick_params(colors=INK, labelsize=8, color=GRAY, which="both")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)


def _series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The finite values of one column, thinned evenly to what a picture can show, its last one kept."""
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    stride = math.ceil(len(points) / MAX_POINTS) or 1
    points = points[::-1][::stride][::-1]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float]) -> list[float]:
    """Means of windows around each value, narrower at the steep beginning, so that the line does not lag behind."""
    sums = [0.0, *itertools.accumulate(values)]
    reach = max(2, len(values) // 40)
    smoothed = []
    for i in range(len(values)):
        first, end = i - min(reach, i), min(len(values), i + min(reach, i) + 1)
        smoothed.append((sums[end] - sums[first]) / (end - first))
    return smoothed
