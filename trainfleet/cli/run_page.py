"""One run, or several beside one another, in lines that a person reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainfleet.cli.table import print_table

if TYPE_CHECKING:
    from trainfleet.monitor.history import Comparison, History
    from trainfleet.monitor.history.figures import Meeting
    from trainfleet.monitor.history.run import Start

MOST_ROWS = 40
"""Lines of one paragraph: beyond it there are thousands of names, and --json has them all."""
MOST_LETTERS = 60
"""Of one value in a table."""


def print_run(run: History, usual: Mapping[str, Any]) -> None:
    """`usual`: the settings of a recipe that says nothing."""
    for title, lines in _paragraphs(run, usual):
        shown = [line for line in lines if line]
        left_out = len(shown) - MOST_ROWS
        if left_out > 0:
            shown = [*shown[:MOST_ROWS], f"and {left_out:,} more, which --json has"]
        for number, line in enumerate(shown):
            print(f"{title if number == 0 else '':<11} {line}".rstrip())


def _paragraphs(run: History, usual: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    from trainfleet.monitor.history import differing
    from trainfleet.monitor.history.figures import ABSENT

    start = run.starts[-1] if run.starts else None
    of = f" of {start.steps:,}" if start else ""
    yield "run", [f"{run.folder}  {run.end}, {run.last_step:,}{of} steps", f"held by {run.running}" * bool(run.running)]
    if start:
        processes = f"{start.world_size} process{'es' * (start.world_size != 1)}"
        yield "model", [f"{start.parameters:,} parameters on {processes}, plan {start.plan}"]
    yield "starts", [_start_in_words(each, bool(run.running) and each is start) for each in run.starts]
    settings = differing([run.recipe, usual]) if run.recipe else {}
    yield "settings", _in_columns({key: value for key, (value, _) in settings.items() if value != ABSENT})
    yield "figures", _in_columns(figures_in_words(run))
    yield "baselines", _in_columns(run.baselines)
    yield "tracked", _tracked(run)
    yield "time", _time(run)
    yield "ranks", _ranks(run)
    yield "anomalies", _anomalies(run)
    yield "alerts", [f"{alert}: {count:,} times" for alert, count in run.alert_counts.most_common()]
    yield "saves", _saves(run)
    yield "environment", [_environment(each) for each in run.environments]
    if run.num_torn:
        lines = f"{run.num_torn:,} line{'s' * (run.num_torn > 1)}"
        yield "unreadable", [f"{lines} of metrics.jsonl, torn by a kill or of another version"]


def figures_in_words(run: History) -> dict[str, str]:
    """The figures that are known, by the names a person gives them."""
    from trainfleet.monitor.history import figures
    from trainfleet.monitor.units import readable_bytes, readable_duration, readable_loss, readable_rate

    found = {name: value for name, value in figures(run).items() if isinstance(value, (int, float))}
    best = f" at step {int(found['best_step']):,}" if "best_step" in found else ""
    last = run.evaluations.last
    words: dict[str, tuple[str, Callable[[Any], str]]] = {
        "loss": ("loss, last 5 %", readable_loss),
        "losses_not_finite": ("losses not finite", lambda value: f"{value:,}" if value else ""),
        "validation_loss": ("validation", lambda value: f"{readable_loss(value)} at step {last.step if last else 0:,}"),
        "best_validation_loss": ("best", lambda value: f"{readable_loss(value)}{best}"),
        "tokens_per_second": ("tokens/s", readable_rate),
        "samples_per_second": ("samples/s", readable_rate),
        "step_seconds": ("seconds a step", lambda value: f"{value:.3g}"),
        "data_wait_share": ("waits for data", lambda value: f"{100 * value:.1f}% of the time in steps"),
        "mfu": ("MFU", lambda value: f"{100 * value:.1f}%"),
        "peak_memory_bytes": ("memory", lambda value: f"at most {readable_bytes(value)} a rank"),
        "goodput": ("goodput", lambda value: f"{100 * value:.0f}%"),
        "wall_seconds": ("wall time", readable_duration),
    }
    return {name: text for key, (name, say) in words.items() if key in found and (text := say(found[key]))}


def print_comparison(names: Sequence[str], runs: Sequence[History], found: Comparison) -> None:
    """Columns are runs; what is alike in all is left out, of figures only what nobody has."""
    from trainfleet.monitor.units import readable_duration

    by_figure = [figures_in_words(run) for run in runs]
    order = dict.fromkeys(name for each in by_figure for name in each)
    rows = [(name, *(each.get(name, "") for each in by_figure)) for name in order]
    rows.insert(0, ("end", *(_short(run.end) for run in runs)))
    rows.insert(1, ("steps", *(f"{run.last_step:,}" for run in runs)))
    _print_rows("figures", names, rows)
    _print_rows("settings that differ", names, [(key, *map(_short, values)) for key, values in found.settings.items()])
    environment = [(key, *map(_short, values)) for key, values in found.environment.items()]
    _print_rows("environments that differ", names, environment)
    _print_rows("loss at equal steps", names, [(f"{m.at:,.0f}", *_losses(m)) for m in found.at_equal_steps])
    rows = [(readable_duration(m.at), *_losses(m, steps=True)) for m in found.at_equal_time]
    _print_rows("loss at equal time in steps", names, rows)


def _losses(meeting: Meeting, *, steps: bool = False) -> list[str]:
    from trainfleet.monitor.units import readable_loss

    words = ["" if loss is None else readable_loss(loss) for loss in meeting.losses]
    return [f"{word} at {step:,}" if steps and word else word for word, step in zip(words, meeting.steps)]


def _print_rows(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    print_table((title, *names), [list(row) for row in rows[:MOST_ROWS]])
    if (left_out := len(rows) - MOST_ROWS) > 0:
        print(f"and {left_out:,} more, which --json has")
    print()


def _start_in_words(start: Start, is_running: bool) -> str:
    from trainfleet.monitor.units import readable_duration

    at = f"after step {start.step:,}" if start.step else "from the beginning"
    ended = _short(start.ended) if start.ended else "running" if is_running else "no word of its end"
    took = f" after {readable_duration(start.seconds)}" if start.ended else ""
    return f"{when(start.time)}  {at}: {ended}{took}"


def _tracked(run: History) -> list[str]:
    from trainfleet.monitor.units import readable_number

    lines = [
        f"{_short(name)}  {readable_number(each.last)} at step {each.step:,}"
        + (f", {readable_number(each.least)} to {readable_number(each.most)}" if each.num_values > 1 else "")
        for name, each in run.tracked.items()
    ]
    if run.num_left_out:
        lines.insert(0, f"{run.num_left_out:,} values of names beyond the first {len(run.tracked):,} are left out")
    return lines


def _time(run: History) -> list[str]:
    from trainfleet.monitor.units import percentages, readable_duration

    parts = {name: seconds for name, seconds in run.goodput.parts.items() if seconds > 0}
    shares = percentages(parts)
    width = max(map(len, parts), default=0)
    ordered = sorted(parts, key=lambda name: -parts[name])
    return [f"{name:<{width}}  {shares[name] or '<1':>3}%  {readable_duration(parts[name])}" for name in ordered]


def _ranks(run: History) -> list[str]:
    if not run.ranks.ranks:
        return []
    hosts = {rank.host for rank in run.ranks.ranks}
    lines = [f"{len(run.ranks.ranks)} reported, on {len(hosts)} host{'s' * (len(hosts) != 1)}"]
    for slow in run.ranks.slow:
        lines.append(
            f"rank {slow.rank} on {slow.host} works {slow.factor:.2f} times as long, most of it in {slow.phase}"
        )
    if not run.ranks.slow:
        lines[0] += "; none is slow"
    return lines


def _anomalies(run: History) -> list[str]:
    lines = [f"{kind}: {count:,} times, {policy}" for (kind, policy), count in run.anomaly_counts.most_common()]
    return [*lines, *(f"step {each['step']:,}: {_short(each.get('what', ''))}" for each in list(run.anomalies)[-5:])]


def _saves(run: History) -> list[str]:
    saves = run.saves
    lines = []
    if saves.num_saved:
        last = f"the last of step {saves.last_step:,}"
        lines.append(f"{saves.num_saved:,}, {last}; they blocked for {saves.blocked_seconds:.2f} s in all")
    if saves.num_failed:
        lines.append(f"{saves.num_failed:,} FAILED, the last: {_short(saves.last_reason)}")
    return lines


def _environment(entry: Mapping[str, Any]) -> str:
    packages = entry.get("packages")
    versions = [f"{name} {version}" for name, version in packages.items()] if isinstance(packages, Mapping) else []
    words = [entry.get("started"), entry.get("host"), f"python {entry.get('python')}", *versions, entry.get("device")]
    return ", ".join(str(word) for word in words if word)


def _in_columns(values: Mapping[str, Any]) -> list[str]:
    width = max(map(len, values), default=0)
    return [f"{name:<{width}}  {_short(value)}" for name, value in values.items()]


def _short(value: Any) -> str:
    from trainfleet.monitor.progress import printable

    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    text = printable(" ".join(text.split()))
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 1]}…"


def when(at: float) -> str:
    """In local time; empty where it is not known, or no time of ours."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) if at > 0 else ""
    except (OverflowError, ValueError, OSError):
        return ""
