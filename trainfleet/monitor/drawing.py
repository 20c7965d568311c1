"""The manner of our pictures: calm axes, few colours, points that are thinned to what a picture can show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainfleet.deps import installed, require
from trainfleet.store import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 4000
"""More points than a picture has columns cost time and show nothing."""
INK, GRAY, PALE = "#333333", "#8a8a8a", "#e6e6e6"
BLUE, ORANGE, GREEN = "#3b6fb6", "#d9662b", "#4b8b3b"
COLORS = (BLUE, ORANGE, GREEN, "#8a5fa8", "#c2a12e", "#3d9a9a", "#b0575c", "#6d6d6d")
"""Of runs that are drawn over one another."""
PHASE_COLORS = {
    "data": ORANGE,
    "transfer": "#eab08c",
    "forward": "#9dbbe3",
    "backward": BLUE,
    "communication": "#8a5fa8",
    "optimizer": GREEN,
    "evaluation": "#c2a12e",
    "checkpoint": "#b0575c",
    "observers": "#3d9a9a",
    "other": "#b5b5b5",
    "computing": "#6f9bd1",
    "undone steps": "#6d4c4c",
    "outside steps": "#dddddd",
}


def need_matplotlib(purpose: str) -> None:
    """DependencyError with the extra to install where it is missing; it is not imported yet, which takes a second."""
    if installed("matplotlib") is None:
        require("matplotlib", "monitor", purpose=purpose)


def new_figure(height: float = 5.6) -> Figure:
    """Nine inches wide and so many high, drawn without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: Figure, path: Path) -> None:
    """Put the picture in place of an older one, wholly or not at all; StoreError where that cannot be."""
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=130)


def make_calm(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRAY)
    axes.tick_params(colors=INK, labelsize=8, color=GRAY, which="both")
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)


def use_log_scale(axes: Axes, shown: Sequence[float]) -> None:
    """A fall from 5.5 to 1.6 shows its end; the ticks stay ordinary numbers. For values above 0 that differ much."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    is_narrow = max(shown) < 30 * min(shown)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if is_narrow else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def is_wide(shown: Sequence[float]) -> bool:
    """Whether the values want `use_log_scale`."""
    return bool(shown) and min(shown) > 0 and max(shown) > 2.5 * min(shown)


def series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The finite values of one column, thinned evenly to what a picture can show, its last one kept."""
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    stride = math.ceil(len(points) / MAX_POINTS) or 1
    points = points[::-1][::stride][::-1]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float]) -> list[float]:
    """Means of windows around each value, narrower at the steep beginning, so that the line does not lag behind."""
    sums = [0.0, *itertools.accumulate(values)]
    reach = max(2, len(values) // 40)
    smoothed = []
    for i in range(len(values)):
        first, end = i - min(reach, i), min(len(values), i + min(reach, i) + 1)
        smoothed.append((sums[end] - sums[first]) / (end - first))
    return smoothed
