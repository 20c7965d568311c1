"""The console of a run in a pipe, a file or a notebook: one line at a time, aligned, easy to grep."""

from __future__ import annotations

import math
from typing import TextIO

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
from trainfleet.monitor.units import readable_bytes, readable_duration, readable_loss, readable_number


class Lines:
    """Writes the first, the last and each `log_interval`-th step, and everything else as it comes.

    A line begins with what it is (`run`, `step`, `eval`, `save`, `slow`, `track`, `alert`, `anom`, `note`, `end`), so
    that `grep ^eval` finds all evaluations; numbers carry no separators.
    """

    def __init__(self, file: TextIO, *, log_interval: int) -> None:
        self._file = file
        self._log_interval = log_interval
        self._progress = Progress()
        self._slow_ranks = SlowRanks()
        self._tracked_at: dict[str, int] = {}

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepEnded):
            self._step(event)
        elif isinstance(event, Tracked):
            self._track(event)
        elif isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, Evaluated):
            best = ["best so far"] * self._progress.evaluate(event)
            metrics = [f"{name} {readable_loss(value)}" for name, value in event.metrics.items()]
            loss = f"validation {readable_loss(event.loss)}"
            self._write("eval", self._at(event.step), loss, *metrics, f"took {event.seconds:.1f} s", *best)
        elif isinstance(event, CheckpointSaved):
            self._write("save", self._at(event.step), event.path, f"blocked {event.seconds:.3f} s")
        elif isinstance(event, CheckpointFailed):
            self._write("save", self._at(event.step), f"FAILED: {event.reason}")
        elif isinstance(event, Restored):
            self._progress.restore(event)
            self._write("load", self._at(event.step), event.path)
        elif isinstance(event, AlertFired):
            self._write("alert", self._at(event.step), printable_line(event.text or event.alert))
        elif isinstance(event, AnomalySeen):
            self._write("anom", self._at(event.step), event.kind, printable_line(event.what), *anomaly_words(event))
        elif isinstance(event, AnomalyOver):
            self._write("anom", self._at(event.step), event.kind, printable_line(event.what), "over")
        elif isinstance(event, SamplesSkipped):
            self._write("skip", f"{event.count} bad samples so far", f"such as {event.example}")
        elif isinstance(event, RanksReported):
            if line := self._slow_ranks.line(event):
                self._write("slow", self._at(event.step), line)
        elif isinstance(event, Noted):
            self._write("note", self._at(event.step), event.title)
            for line in printable(event.text).splitlines():
                self._write("   |", line)
        elif isinstance(event, RunEnded):
            self._end(event)

    def _start(self, event: RunStarted) -> None:
        self._progress.start(event)
        self._tracked_at.clear()
        self._write(
            "run",
            event.folder or "no folder",
            f"plan {event.plan or '-'}",
            f"parameters {event.parameters}",
            f"processes {event.world_size}",
            f"steps {event.steps}",
            *[f"resumed after step {event.start_step}"] * bool(event.start_step),
        )

    def _step(self, event: StepEnded) -> None:
        progress = self._progress
        is_first = progress.last is None
        progress.step(event)
        if not (is_first or event.step % self._log_interval == 0 or event.step == progress.steps or event.skipped):
            return
        grad_norm = "-" if event.grad_norm is None else f"{event.grad_norm:.3g}"
        words = [
            f"loss {readable_loss(event.loss)}",
            f"smooth {readable_loss(progress.loss.value)}",
            f"lr {event.learning_rate:.2e}",
            f"grad {grad_norm:<6}",
            f"tokens/s {progress.throughput.tokens_per_second:<7.0f}",
            f"samples/s {progress.throughput.samples_per_second:<6.1f}",
            f"memory {readable_bytes(event.memory_bytes):<7}",
        ]
        if not math.isnan(remaining := progress.remaining_seconds):
            words.append(f"eta {readable_duration(remaining)}")
        if (mfu := progress.throughput.mfu) is not None:
            words.append(f"mfu {mfu:.1%}")
        if feed := progress.feed:
            words.append(f"feed {feed}")
        percent, causes = progress.waiting
        if percent >= LEAST_WAITING:
            words.append(f"waits for data {percent}%" + (f": {causes}" if causes else ""))
        if event.skipped:
            words.append(f"skipped: overflow at loss scale {event.loss_scale}")
        self._write("step", self._at(event.step), *words)

    def _track(self, event: Tracked) -> None:
        """At most one line a name and `log_interval`: a callback may track at every step."""
        self._progress.track(event)
        last = self._tracked_at.get(event.name)
        if last is None or event.step - last >= self._log_interval or event.step < last:
            self._tracked_at[event.name] = event.step
            self._write("track", self._at(event.step), f"{event.name} {event.value:.6g}")

    def _end(self, event: RunEnded) -> None:
        self._write("end", self._at(event.step), event.reason, f"took {readable_duration(event.seconds)}")
        summary = self._progress.summary(event)
        names = [name.removeprefix(BASELINE) for name in summary]
        for name, value in zip(names, summary.values()):
            first, *more = printable(readable_number(value)).splitlines() or [""]
            self._write("   |", f"{name:<{max(map(len, names))}}", first)
            for line in more:
                self._write("   |", line)

    def _at(self, step: int) -> str:
        steps = self._progress.steps
        return f"{step:>7}" if steps is None else f"{step:>{max(6, len(str(steps)))}}/{steps}"

    def _write(self, kind: str, *words: str) -> None:
        encoding = self._file.encoding or "utf-8"
        line = f"{kind:<5} {'  '.join(words)}".rstrip()
        self._file.write(line.encode(encoding, "replace").decode(encoding) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing is held: every line has been flushed."""
