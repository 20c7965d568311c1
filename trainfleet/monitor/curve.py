"""The loss of a run as a picture: training, validation, baselines, and the learning rate below."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainfleet.events import Evaluated, Event, RunEnded, RunStarted, StepEnded, Tracked
from trainfleet.monitor.drawing import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    is_wide,
    make_calm,
    need_matplotlib,
    new_figure,
    series,
    smooth,
    use_log_scale,
    write_png,
)
from trainfleet.monitor.jsonl import read_metrics
from trainfleet.monitor.progress import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SHARE = 0.01
"""Of the run's time that drawing may take; the last picture is drawn in any case."""
FIRST_DRAWING_SECONDS = 1.5
"""What the first picture is expected to take: matplotlib has to be imported for it."""
MAX_BASELINES = 8
"""Marks that a picture can show; of more, the largest are left out and counted."""


class LossCurve:
    """Draws `path` (a PNG) at evaluations and at the end.

    A resumed run shows the earlier points too, read from `history` (what JsonLines writes; by default
    `metrics.jsonl` beside the picture) if it is there.
    """

    in_loop = True

    def __init__(self, path: str | Path, *, history: str | Path | None = None) -> None:
        need_matplotlib("The picture of the loss")  # importing it waits for the first picture
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
        write_png(figure, self.path)
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


def draw_curve(rows: Sequence[dict[str, Any]], *, baselines: dict[str, float], title: str, every: int = 1) -> Figure:
    """Rows as `read_metrics` gives them: `step`, `loss`, `learning_rate`, `validation_loss`, each where it is known.

    Where a row stands for more than one step, `every` is how many.
    """
    figure = new_figure()
    grid = figure.add_gridspec(2, 1, height_ratios=(5, 1))
    loss_axes = figure.add_subplot(grid[0])
    rate_axes = figure.add_subplot(grid[1], sharex=loss_axes)
    loss_axes.set_title(title, loc="left", fontsize=10, color=INK)
    _draw_loss(loss_axes, rows, baselines, "each step" if every == 1 else f"means of {every} steps")
    rates = series(rows, "learning_rate")
    rate_axes.plot(*rates, color=GREEN, linewidth=1.2)
    rate_axes.set_ylabel("learning rate", fontsize=9, color=INK)
    rate_axes.set_ylim(bottom=0)
    rate_axes.set_xlabel("step", fontsize=9, color=INK)
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    rate_axes.yaxis.get_offset_text().set_fontsize(7)
    rate_axes.locator_params(axis="y", nbins=2)
    for axes in (loss_axes, rate_axes):
        make_calm(axes)
    loss_axes.tick_params(labelbottom=False)
    return figure


def _draw_loss(axes: Axes, rows: Sequence[dict[str, Any]], baselines: dict[str, float], what: str) -> None:
    steps, losses = series(rows, "loss")
    if steps:
        smoothed = smooth(losses)
        axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8, label=f"training, {what}")
        axes.plot(steps, smoothed, color=BLUE, linewidth=1.8, label=f"training, smoothed: {smoothed[-1]:.4g}")
    at, validation = series(rows, "validation_loss")
    if at:
        axes.plot(
            at, validation, "o-", color=ORANGE, markersize=4, linewidth=1, label=f"validation: {validation[-1]:.4g}"
        )
    known = draw_baselines(axes, baselines)
    shown = [*losses, *validation, *known]
    if is_wide(shown):
        use_log_scale(axes, shown)
    axes.set_ylabel("loss", fontsize=9, color=INK)
    if steps or at:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")


def draw_baselines(axes: Axes, baselines: dict[str, float]) -> list[float]:
    """Lines across with their names; the values that were drawn."""
    finite = sorted((value, name) for name, value in baselines.items() if math.isfinite(value))
    known = [(f"{name} {value:.4g}", value) for value, name in finite[:MAX_BASELINES]]
    if left_out := len(finite) - len(known):
        known[-1] = (f"{known[-1][0]}, and {left_out:,} above it that are not shown", known[-1][1])
    for text, value in known:
        axes.axhline(value, color=GRAY, linestyle="--", linewidth=1)
        axes.annotate(
            text,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=GRAY,
        )
    return [value for _, value in known]
