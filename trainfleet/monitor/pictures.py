"""Runs as pictures: loss, throughput, memory and time, of one run or of several laid over one another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from trainfleet.monitor.curve import draw_baselines, draw_curve
from trainfleet.monitor.drawing import (
    COLORS,
    GRAY,
    INK,
    ORANGE,
    PHASE_COLORS,
    is_wide,
    make_calm,
    need_matplotlib,
    new_figure,
    smooth,
    use_log_scale,
)
from trainfleet.monitor.history import Group, History
from trainfleet.monitor.units import percentages, readable_bytes, readable_duration, readable_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_RUNS = len(COLORS)
"""Runs that can be told apart in one picture; of more, the first are drawn."""
MAX_BARS = 120
"""Columns of stacked phases; of more steps, each is a mean."""
MAX_MARKS = 40
"""Restarts that are marked."""
MAX_CUT = 8
"""Stacks beyond the top that have their height written beside them."""
LEAST_SHARE = 0.0005
"""Phases with less than this share of the time are drawn, and have no entry in the legend."""
Points: TypeAlias = tuple[list[int], list[float]]


def draw_pictures(runs: Sequence[History]) -> dict[str, Figure]:
    """`loss`, `throughput`, `memory` and `time` of the first MAX_RUNS runs; those without a step are drawn as nothing.

    DependencyError with the extra to install where matplotlib is missing.
    """
    need_matplotlib("Drawing a run")
    runs = runs[:MAX_RUNS]
    return {name: draw(runs) for name, draw in _PICTURES.items()}


def names_of(runs: Sequence[History]) -> list[str]:
    """Names that tell runs apart: of folders, or their paths where two folders have one name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def draw_loss(runs: Sequence[History]) -> Figure:
    """Of one run as its own `loss.png`; of several, each step faint, smoothed bold, evaluations as dots."""
    if len(runs) == 1:
        return draw_curve(rows_of(runs[0]), baselines=runs[0].baselines, title=_title(runs), every=runs[0].steps.every)
    figure = new_figure(4.6)
    axes = figure.add_subplot()
    shown: list[float] = []
    baselines: dict[str, float] = {}
    for run, name, color in zip(runs, names_of(runs), COLORS):
        steps, losses = points(run, lambda group: group.loss)
        smoothed = smooth(losses)
        label = f"{name}: {smoothed[-1]:.4g}" if losses else f"{name}: no step"
        axes.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(steps, smoothed, color=color, linewidth=1.6, label=label)
        found = [(each.step, each.loss) for each in run.evaluations if math.isfinite(each.loss)]
        axes.plot([step for step, _ in found], [loss for _, loss in found], "o", color=color, markersize=4)
        shown += [*losses, *(loss for _, loss in found)]
        baselines |= run.baselines
    shown += draw_baselines(axes, baselines)
    if is_wide(shown):
        use_log_scale(axes, shown)
    _finish(axes, _title(runs), "loss")
    _legend(axes, "upper right")
    return figure


def draw_throughput(runs: Sequence[History]) -> Figure:
    """Tokens (or samples, where a sample is a token) a second of each step, and how much of it waited for data."""
    unit = "samples" if all(group.tokens == group.samples for run in runs for group in run.steps.groups) else "tokens"
    figure = new_figure()
    grid = figure.add_gridspec(2, 1, height_ratios=(4, 1))
    speed_axes = figure.add_subplot(grid[0])
    wait_axes = figure.add_subplot(grid[1], sharex=speed_axes)
    top = 1.0
    for run, name, color in zip(runs, names_of(runs), COLORS):
        steps, speeds = points(run, lambda group: group.tokens_per_second)
        mean = readable_rate(run.steps.tokens_per_second)
        mfu = "" if math.isnan(run.steps.mfu) else f", MFU {100 * run.steps.mfu:.1f}%"
        label = f"{'' if len(runs) == 1 else name + ': '}{mean} {unit}/s{mfu}"
        speed_axes.plot(steps, speeds, color=color, alpha=0.25, linewidth=0.8)
        speed_axes.plot(steps, smooth(speeds), color=color, linewidth=1.8, label=label)
        at, waits = points(run, lambda group: 100 * min(1.0, _share(group.data_seconds, group.seconds)))
        top = max([top, *waits])
        color = ORANGE if len(runs) == 1 else color
        wait_axes.plot(at, waits, color=color, alpha=0.25, linewidth=0.8)
        wait_axes.plot(at, smooth(waits), color=color, linewidth=1.4)
    speed_axes.set_ylim(bottom=0)
    wait_axes.set_ylim(0, 1.05 * top)
    wait_axes.locator_params(axis="y", nbins=2)
    _mark_restarts(speed_axes, runs)
    _finish(speed_axes, _title(runs), f"{unit} a second", step=False)
    _finish(wait_axes, "", "% waiting\nfor data")
    speed_axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    _legend(speed_axes, "lower right")
    return figure


def draw_memory(runs: Sequence[History]) -> Figure:
    """Bytes in use by the rank that speaks for all, and, of one run, the band of all ranks where they reported."""
    figure = new_figure(4.2)
    axes = figure.add_subplot()
    for run, name, color in zip(runs, names_of(runs), COLORS):
        reports = [(step, sizes) for step, sizes in run.memory if sizes]
        if len(runs) == 1 and any(len(sizes) > 1 for _, sizes in reports):
            axes.fill_between(
                [step for step, _ in reports],
                [min(sizes) for _, sizes in reports],
                [max(sizes) for _, sizes in reports],
                color=color,
                alpha=0.15,
                linewidth=0,
                label=f"all {max(len(sizes) for _, sizes in reports)} ranks",
            )
        peak = f"at most {readable_bytes(run.steps.peak_bytes)}"
        label = f"the first rank, {peak}" if len(runs) == 1 else f"{name}: {peak}"
        axes.plot(*points(run, lambda group: group.memory_bytes), color=color, linewidth=1.8, label=label)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    _mark_restarts(axes, runs)
    _finish(axes, _title(runs), "memory in use")
    axes.yaxis.set_major_formatter(lambda value, _: readable_bytes(value) if value else "0")
    _legend(axes, "lower right")
    return figure


def draw_time(runs: Sequence[History]) -> Figure:
    """Seconds a step with what lies between steps, stacked by phase; below them the whole wall time, with goodput.

    Of several runs: seconds in steps as lines, and the means of all phases stacked.
    """
    figure = new_figure()
    grid = figure.add_gridspec(2, 1, height_ratios=(5, 1) if len(runs) == 1 else (3, 1 + 0.3 * len(runs)))
    step_axes, bar_axes = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    names = names_of(runs)
    if len(runs) == 1:
        _cut_off(step_axes, _stack_steps(step_axes, runs[0]))
        goodput = runs[0].goodput
        _stack_bars(bar_axes, [dict(goodput.parts)], [""])
        bar_axes.set_xlim(0, goodput.seconds or 1.0)
        share = "unknown" if math.isnan(goodput.share) else f"{100 * goodput.share:.0f}%"
        words = f"wall time {readable_duration(goodput.seconds)}, goodput {share}"
        bar_axes.set_xlabel(words, fontsize=9, color=INK)
        bar_axes.xaxis.set_major_formatter(lambda value, _: readable_duration(value))
    else:
        for run, name, color in zip(runs, names, COLORS):
            steps, seconds = points(run, lambda group: group.seconds / group.num_steps)
            step_axes.plot(steps, seconds, color=color, alpha=0.25, linewidth=0.8)
            step_axes.plot(steps, smooth(seconds), color=color, linewidth=1.6, label=name)
        bars = [{phase: seconds / run.steps.num_steps for phase, seconds in run.steps.phases.items()} for run in runs]
        _stack_bars(bar_axes, bars, names)
        bar_axes.set_xlabel("seconds a step by phase, means", fontsize=9, color=INK)
        _legend(step_axes, "lower right")
    step_axes.set_ylim(bottom=0)
    _mark_restarts(step_axes, runs)
    means = f", means of {_steps_a_stack(runs[0]):,}" if len(runs) == 1 and _steps_a_stack(runs[0]) > 1 else ""
    _finish(step_axes, _title(runs), f"seconds a step{means}")
    _name_phases(figure, runs)
    return figure


def rows_of(run: History) -> list[dict[str, Any]]:
    """What `draw_curve` takes: a row for each group of steps and each evaluation."""
    rows = [
        {"step": group.step, "loss": group.loss, "learning_rate": group.learning_rate} for group in run.steps.groups
    ]
    rows += [{"step": each.step, "validation_loss": each.loss} for each in run.evaluations]
    return sorted(rows, key=lambda row: row["step"])


def points(run: History, value: Callable[[Group], float]) -> Points:
    """The finite values of a run's groups of steps."""
    found = [(group.step, value(group)) for group in run.steps.groups]
    kept = [(step, each) for step, each in found if math.isfinite(each)]
    return [step for step, _ in kept], [each for _, each in kept]


def _stack_steps(axes: Axes, run: History) -> list[tuple[float, float]]:
    """Where the stacks stand, and how high they are."""
    groups = run.steps.groups
    size = _steps_a_stack(run) // run.steps.every
    stacks = [groups[i : i + size] for i in range(0, len(groups), size)]
    if not stacks:
        return []
    edges = [stacks[0][0].step - stacks[0][0].num_steps, *(stack[-1].step for stack in stacks)]
    below = [0.0] * len(stacks)
    for phase in _phases([run]):
        values = [
            sum(group.phases.get(phase, 0.0) for group in stack) / sum(group.num_steps for group in stack)
            for stack in stacks
        ]
        above = [low + value for low, value in zip(below, values)]
        axes.stairs(above, edges, baseline=below, fill=True, color=PHASE_COLORS.get(phase, GRAY), label=phase)
        below = above
    axes.set_xlim(edges[0], edges[-1])
    return [((left + right) / 2, high) for left, right, high in zip(edges, edges[1:], below)]


def _steps_a_stack(run: History) -> int:
    return max(1, math.ceil(len(run.steps.groups) / MAX_BARS)) * run.steps.every


def _cut_off(axes: Axes, stacks: Sequence[tuple[float, float]]) -> None:
    """A few stacks with an evaluation in them must not flatten all others: they end at the top, with their height."""
    if not stacks:
        return
    top = 1.25 * sorted(high for _, high in stacks)[int(0.9 * (len(stacks) - 1))]
    higher = [(at, high) for at, high in stacks if high > top]
    if not higher or max(high for _, high in higher) < 2 * top:
        return
    axes.set_ylim(top=top)
    named = higher if len(higher) <= MAX_CUT else sorted(higher, key=lambda stack: -stack[1])[:MAX_CUT]
    for at, high in named:
        text = f"{high:.2g} s" if high < 10 else readable_duration(high)
        axes.annotate(
            text,
            (at, top),
            xytext=(4, -3),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=7,
            color=INK,
        )


def _stack_bars(axes: Axes, parts: Sequence[dict[str, float]], names: Sequence[str]) -> None:
    order = [name for name in PHASE_COLORS if any(name in each for each in parts)]
    order += sorted({name for each in parts for name in each} - set(order))
    lefts = [0.0] * len(parts)
    for name in order:
        widths = [each.get(name, 0.0) for each in parts]
        axes.barh(range(len(parts)), widths, left=lefts, height=0.7, color=PHASE_COLORS.get(name, GRAY), label=name)
        lefts = [left + width for left, width in zip(lefts, widths)]
    axes.set_yticks(range(len(parts)), names)
    axes.invert_yaxis()
    make_calm(axes)
    axes.grid(visible=False)
    if names == [""]:
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])


def _name_phases(figure: Figure, runs: Sequence[History]) -> None:
    """One legend for all stacks, beside them; of one run with the share of the wall time."""
    from matplotlib.patches import Patch

    wholes: dict[str, float] = {}
    for run in runs:
        for name, seconds in (run.goodput.parts if len(runs) == 1 else run.steps.phases).items():
            wholes[name] = wholes.get(name, 0.0) + seconds
    shares = percentages(wholes)
    total = sum(wholes.values())
    shown = [name for name in _ordered(wholes) if wholes[name] > LEAST_SHARE * total]
    handles = [
        Patch(color=PHASE_COLORS.get(name, GRAY), label=f"{name} {shares[name] or '<1'}%" if len(runs) == 1 else name)
        for name in reversed(shown)
    ]
    if handles:
        figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9, labelcolor=INK)


def _phases(runs: Sequence[History]) -> list[str]:
    return _ordered({phase: 0.0 for run in runs for phase in run.steps.phases})


def _ordered(parts: dict[str, float]) -> list[str]:
    """In the order of a step; phases that are not known here come last."""
    return [*(name for name in PHASE_COLORS if name in parts), *sorted(set(parts) - set(PHASE_COLORS))]


def _mark_restarts(axes: Axes, runs: Sequence[History]) -> None:
    """Of one run alone: in a picture of several nobody could tell whose they are."""
    if len(runs) != 1:
        return
    for number, start in enumerate(runs[0].starts[1 : MAX_MARKS + 1]):
        label = "started anew" if number == 0 else None
        axes.axvline(start.step, color=GRAY, linestyle=":", linewidth=1, label=label)


def _title(runs: Sequence[History]) -> str:
    if len(runs) != 1:
        return f"{len(runs)} runs"
    run = runs[0]
    start = run.starts[-1] if run.starts else None
    words = [f"{run.name}   {start.parameters:,} parameters", start.plan] if start else [run.name]
    if count := run.steps.not_finite:
        words.append(f"{count:,} loss{'es' * (count > 1)} not finite")
    return ", ".join(filter(None, words))


def _finish(axes: Axes, title: str, ylabel: str, *, step: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    make_calm(axes)
    if title:
        axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, steps=[1, 2, 2.5, 5, 10]))
    if step:
        axes.set_xlabel("step", fontsize=9, color=INK)
    else:
        axes.tick_params(labelbottom=False)


def _legend(axes: Axes, place: Literal["upper right", "lower right"]) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc=place)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


_PICTURES: dict[str, Callable[[Sequence[History]], Figure]] = {
    "loss": draw_loss,
    "throughput": draw_throughput,
    "memory": draw_memory,
    "time": draw_time,
}
