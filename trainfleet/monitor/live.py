"""The console of a run in a terminal: one calm line that moves, and above it what is worth keeping."""

from __future__ import annotations

import math
import sys
import time
from typing import TextIO

from rich.box import ROUNDED
from rich.console import Console as RichConsole
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from trainfleet.events import (
    AlertFired,
    AnomalyOver,
    AnomalySeen,
    CheckpointFailed,
    CheckpointSaved,
    Evaluated,
    Event,
    Noted,
    RanksReported,
    Restored,
    RunEnded,
    RunStarted,
    SamplesSkipped,
    StepEnded,
    Tracked,
)
from trainfleet.monitor.progress import BASELINE, LEAST_WAITING, Progress, anomaly_words, printable, printable_line
from trainfleet.monitor.slow_ranks import SlowRanks
from trainfleet.monitor.units import readable_bytes, readable_duration, readable_loss, readable_number, readable_rate

REFRESH_SECONDS = 0.25  # a refresh takes 0.2 ms: 0.1 % of a core


class LiveLine:
    """Shows step, loss, speed, memory and what remains on one line, as much of it as the width allows.

    It is one line and has no thread on purpose. What another process writes to the terminal is not wiped out
    by the next refresh, a worker forked in the middle of a refresh inherits no lock, and a step that takes
    a minute shows honestly where the last one ended.
    """

    def __init__(self, file: TextIO) -> None:
        self._console = RichConsole(file=file, highlight=False, force_terminal=True, force_jupyter=False)
        self._progress = Progress()
        self._slow_ranks = SlowRanks()
        self._live: Live | None = None
        self._refreshed_at = -math.inf

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepEnded):
            self._progress.step(event)
            self._refresh(is_last=event.step == self._progress.steps)
        elif isinstance(event, Tracked):
            self._progress.track(event)
            if event.name.startswith(BASELINE):
                self._keep(event.step, f"{event.name.removeprefix(BASELINE)} {readable_loss(event.value)}", style="dim")
        elif isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, Evaluated):
            self._evaluation(event)
        elif isinstance(event, CheckpointSaved):
            self._keep(event.step, f"saved, {event.seconds:.2f} s", style="dim")
        elif isinstance(event, CheckpointFailed):
            self._keep(event.step, f"not saved: {event.reason}", style="bold red")
        elif isinstance(event, Restored):
            self._progress.restore(event)
            self._keep(event.step, f"restored from {event.path}")
        elif isinstance(event, AlertFired):
            self._keep(event.step, f"alert: {printable_line(event.text or event.alert)}", style="bold red")
        elif isinstance(event, AnomalySeen):
            words = [event.kind.replace("_", " "), printable_line(event.what), *anomaly_words(event)]
            self._keep(
                event.step,
                ": ".join(words[:2]) + "".join(f", {word}" for word in words[2:]),
                style="yellow" if event.policy == "warn" else "bold red",
            )
        elif isinstance(event, AnomalyOver):
            self._keep(event.step, printable_line(event.what), style="dim")
        elif isinstance(event, SamplesSkipped):
            at = self._progress.last.step if self._progress.last else 0
            self._keep(at, f"{event.count} bad samples left out so far, such as {event.example}", style="yellow")
        elif isinstance(event, RanksReported):
            if line := self._slow_ranks.line(event):
                self._keep(event.step, line, style="yellow")
        elif isinstance(event, Noted):
            text = Text(printable(event.text).strip("\n"))
            box = Panel(text, title=Text(event.title), title_align="left", border_style="dim", box=ROUNDED)
            self._console.print(Padding(box, (1, 2)))
        elif isinstance(event, RunEnded):
            self._end(event)

    def close(self) -> None:
        """Take the live line away and give the terminal back as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    # What stays on the screen

    def _start(self, event: RunStarted) -> None:
        self._progress.start(event)
        processes = "1 process" if event.world_size == 1 else f"{event.world_size} processes"
        resumed = f", going on after {event.start_step:,}" if event.start_step else ""
        header = Table.grid(padding=(0, 2))
        header.add_column(style="dim")
        header.add_column()
        header.add_row(Text("run"), Text(event.folder or "nothing is written", style="bold"))
        header.add_row(Text("plan"), Text(event.plan))
        header.add_row(Text("model"), Text(f"{event.parameters:,} parameters on {processes}"))
        header.add_row(Text("steps"), Text(f"{event.steps:,}{resumed}"))
        self._console.print(Padding(header, (1, 2)))

    def _evaluation(self, event: Evaluated) -> None:
        is_best = self._progress.evaluate(event)
        line = Text.assemble(("validation ", "dim"), (readable_loss(event.loss), "bold green" if is_best else "bold"))
        if not math.isnan(self._progress.loss.value):
            line.append("  train ", "dim").append(readable_loss(self._progress.loss.value))
        for name, value in event.metrics.items():
            line.append(f"  {name} ", "dim").append(readable_loss(value))
        if is_best:
            line.append("  best so far", "green")
        self._keep(event.step, line)

    def _end(self, event: RunEnded) -> None:
        self.close()
        color = {"finished": "green", "stopped early": "yellow", "interrupted": "yellow"}.get(event.reason, "red")
        end = Text.assemble(
            (printable(event.reason), f"bold {color}"),
            f" at step {event.step:,} after {readable_duration(event.seconds)}",
        )
        summary = Table.grid(padding=(0, 2))
        summary.add_column(style="dim")
        summary.add_column()
        entries = self._progress.summary(event)
        for name, value in entries.items():
            is_baseline = name.startswith(BASELINE)
            text = Text(printable(readable_number(value)), style="dim" if is_baseline else "bold")
            summary.add_row(Text(name.removeprefix(BASELINE)), text)
        self._console.print(Padding(end, (1, 2, 1 if entries else 0, 2)))
        if entries:
            self._console.print(Padding(summary, (0, 2, 1, 2)))

    def _keep(self, step: int, line: str | Text, *, style: str = "") -> None:
        text = line if isinstance(line, Text) else Text(printable(line), style=style)
        self._console.print(Text.assemble((f"{step:>8,}  ", "dim"), text), soft_wrap=True)

    # The line that moves

    def _refresh(self, *, is_last: bool) -> None:
        now = time.monotonic()
        if now - self._refreshed_at < REFRESH_SECONDS and not is_last:
            return
        self._refreshed_at = now
        line = fit_line(self._progress, width=self._console.width - 1)
        if self._live is None:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
            self._console.show_cursor(True)  # a rank that is killed cannot give it back
        self._live.update(line, refresh=True)


BAR = 10
"""Columns of the smallest progress bar that is worth its room."""


def fit_line(progress: Progress, *, width: int) -> Text:
    """The live line in at most `width` columns: what matters least gives way first, the bar takes what is left."""
    step = progress.last
    assert step is not None, "the line is drawn after a step"
    speed = progress.throughput
    count = f"{step.step:>8,}" + (f"/{progress.steps:,}" if progress.steps else "")
    has_tokens = step.tokens != step.samples
    # (the order in which parts are given room, name, value), listed as they are shown
    parts: list[tuple[int, str, str]] = [
        (0, "", count),
        (1, "loss", readable_loss(progress.loss.value)),
        (5, "now", readable_loss(step.loss)),
        (6, "lr", f"{step.learning_rate:.1e}"),
        (7, "grad", "-" if step.grad_norm is None else f"{step.grad_norm:.2f}"),
        *[(2, "tokens/s", readable_rate(speed.tokens_per_second))] * has_tokens,
        (8 if has_tokens else 2, "samples/s", readable_rate(speed.samples_per_second)),
        (3, "mem", readable_bytes(step.memory_bytes)),
        (2, "left", readable_duration(progress.remaining_seconds)),
    ]
    percent, causes = progress.waiting
    if percent >= LEAST_WAITING:
        parts += [(2, "waits for data", f"{percent}%"), (5, "of it", causes)][: 1 + bool(causes)]
    if feed := progress.feed:
        parts.append((5, "feed", feed))
    if speed.mfu is not None:
        parts.append((8, "mfu", f"{speed.mfu:.1%}"))
    if step.loss_scale is not None:
        parts.append((9, "scale", f"{step.loss_scale:g}"))
    parts += [(10 + i, name, f"{value:.4g}") for i, (name, value) in enumerate(progress.tracked.items())]

    bar = "━" * BAR if progress.steps else ""
    room = width
    shown: set[tuple[int, str, str]] = set()
    for part in sorted([*parts, (4, "", bar)]):
        needed = sum(map(len, part[1:])) + bool(part[1]) + 2 * bool(shown)
        if needed > room:
            break
        room -= needed
        shown.add(part)

    line = Text(no_wrap=True, overflow="crop")
    for part in parts:
        if part not in shown:
            continue
        _, name, value = part
        if name:
            line.append(f"  {name} ", "dim").append(value, "bold" if name == "loss" else "")
        else:
            line.append(value, "bold")
            if (4, "", bar) in shown and progress.steps:
                line.append("  ").append_text(_bar(step.step / progress.steps, BAR + min(room, 18)))
    return line


def _bar(share: float, width: int) -> Text:
    full = round(min(1.0, share) * width)
    return Text.assemble(("━" * full, "green"), ("━" * (width - full), "bright_black"))
