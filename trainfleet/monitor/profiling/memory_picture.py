"""The memory of a step as a picture: live bytes by kind through its phases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainfleet.monitor.drawing import GRAY, INK, make_calm, need_matplotlib, new_figure, write_png
from trainfleet.monitor.profiling.holdings import KINDS
from trainfleet.monitor.profiling.memory_report import MemoryReport, Timeline
from trainfleet.monitor.units import readable_bytes, readable_duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "parameters": "#3b6fb6",
    "gathered": "#8fb0d9",
    "gradients": "#d9662b",
    "optimizer": "#4b8b3b",
    "buffers": "#a3c495",
    "activations": "#e3b448",
    "batch": "#7d6b9d",
    "communication": "#5aa6a6",
    "temporary": "#c9c9c9",
    "other": "#8a8a8a",
}
"""By kind; what stays is at the bottom and dark, what comes and goes above it."""
LEAST_WIDTH = 0.04
"""Share of the picture that a phase needs for its name."""


def write_memory_picture(report: MemoryReport, path: Path) -> None:
    """Put the picture (a PNG) in place of an older one. DependencyError without matplotlib, StoreError as usual."""
    need_matplotlib("The picture of the memory")
    write_png(draw_memory(report), path)


def draw_memory(report: MemoryReport) -> Figure:
    """Live bytes over the seconds of the step, stacked by kind, the peak marked."""
    from matplotlib.ticker import FuncFormatter

    figure = new_figure(4.6)
    axes = figure.add_subplot()
    rank = f", rank {report.rank}" if report.rank else ""
    title = f"memory of step {report.step}{rank} on {report.device}   peak {readable_bytes(report.peak_bytes)}"
    axes.set_title(f"{title} in {report.peak_phase}", loc="left", fontsize=10, color=INK, pad=18)
    line = report.timeline
    kinds = [kind for kind in KINDS if kind in line.bytes]
    axes.stackplot(
        line.seconds,
        *(line.bytes[kind] for kind in kinds),
        colors=[COLORS[kind] for kind in kinds],
        labels=kinds,
        step="post",
        linewidth=0,
    )
    _mark_peak(axes, line, report.peak_bytes)
    _mark_phases(axes, line)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: readable_bytes(value) if value else "0"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _time(value)))
    make_calm(axes)
    axes.set_ylim(0, report.peak_bytes * 1.12 or 1)
    axes.set_xlim(0, _width(line))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=8.5, labelcolor=INK)
    return figure


def _mark_peak(axes: Axes, line: Timeline, peak: int) -> None:
    axes.axhline(peak, color=INK, linewidth=0.8, linestyle="--")
    axes.annotate(
        f"peak {readable_bytes(peak)}",
        (1, peak),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=INK,
    ).set_in_layout(False)


def _mark_phases(axes: Axes, line: Timeline) -> None:
    """Their names above the picture where there is room, and where each begins."""
    whole = _width(line)
    for name, begin, end in _merged(line.phases):
        if name == "other" or (end - begin) / whole < LEAST_WIDTH:
            continue
        axes.axvline(begin, color="white", linewidth=0.8, alpha=0.8)
        axes.annotate(
            name,
            ((begin + end) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=GRAY,
        ).set_in_layout(False)


def _width(line: Timeline) -> float:
    return max([*line.seconds, *(end for _, _, end in line.phases)], default=0.0) or 1.0


def _merged(phases: tuple[tuple[str, float, float], ...]) -> list[tuple[str, float, float]]:
    """Stretches of one phase that only moments of others interrupt."""
    found: list[tuple[str, float, float]] = []
    for name, begin, end in sorted(phases, key=lambda phase: phase[1]):
        same = next((i for i in range(len(found) - 1, -1, -1) if found[i][0] == name), None)
        if same is not None and begin - found[same][2] < 0.1 * (end - found[same][1]):
            found[same] = (name, found[same][1], end)
        else:
            found.append((name, begin, end))
    return found


def _time(seconds: float) -> str:
    return readable_duration(seconds) if seconds >= 60 else f"{seconds:.3g} s"
