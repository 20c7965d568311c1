"""MemoryWatch: follows the memory of a few steps of a run, on every rank, and writes what it found."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from trainfleet.batch import Batch
from trainfleet.comm.group import Group
from trainfleet.errors import DependencyError, StoreError
from trainfleet.events import Event, Noted, RunStarted, StepEnded
from trainfleet.monitor import MemoryProfiler, MemoryReport, RunFolder
from trainfleet.monitor.profiling.memory_picture import write_memory_picture
from trainfleet.monitor.profiling.step_range import StepRange
from trainfleet.monitor.units import readable_bytes
from trainfleet.parallel import Engine
from trainfleet.stopwatch import timed
from trainfleet.store import replacing
from trainfleet.training.watchers.watcher import Judgement, UnderWay, Watcher

logger = logging.getLogger(__name__)


class MemoryWatch(Watcher):
    """Outside of `steps` it does nothing. Rank 0's report is written and told, with the totals of all ranks."""

    def __init__(self, steps: StepRange, folder: RunFolder, group: Group) -> None:
        self._steps, self._folder, self._group = steps, folder, group
        self._engine: Engine | None = None
        self._last = steps.last
        self._profiler: MemoryProfiler | None = None
        self._begun = False

    def hear(self, event: Event) -> None:
        if not isinstance(event, RunStarted):
            return
        taken, steps = event.start_step, event.steps
        self._last = min(self._steps.last, steps)
        if self._group.rank == 0 and (taken >= self._steps.first or self._steps.first > steps):
            logger.warning(
                "monitor.memory asks for step %s, but %s.", self._steps, self._steps.what_is_left(taken, steps)
            )

    def start(self, engine: Engine) -> None:
        self._engine = engine

    def begin(self, step: int, micro_batches: Sequence[Batch]) -> None:
        if step not in self._steps or self._begun:
            return
        self._begun = True
        profiler = MemoryProfiler(
            self._engine.model if self._engine is not None else None,
            getattr(self._engine, "optimizer", None),
            step=step - 1,
            rank=self._group.rank,
        )
        try:
            with timed("observers"):
                profiler.start(micro_batches)
            self._profiler = profiler
        except RuntimeError as exc:  # another profiler of torch
            logger.warning("The memory of step %d is not reported: %s", step, exc)

    def judge(self, under_way: UnderWay) -> Judgement | None:
        if self._profiler is not None:
            self._profiler.look()  # gradients are whole, also those of an optimizer that is none of torch's
        return None

    def end(self, ended: StepEnded) -> None:
        if self._profiler is not None:
            self._profiler.step()
        if self._begun and ended.step == self._last:
            with timed("observers"):
                report = self._finish()
                totals = self._group.exchange(None if report is None else _totals(report))
                if report is not None and self._group.rank == 0:
                    self._tell(report, totals)

    def close(self) -> None:
        """A run that ends within its steps reports those that it took, without the totals of other ranks."""
        report = self._finish()
        if report is not None and self._group.rank == 0:
            self._write(report, [_totals(report)])

    def _finish(self) -> MemoryReport | None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return None
        try:
            profiler.stop()
            return profiler.get_memory_report()
        except Exception:  # like an observer's, its failure does not stop a run; the other ranks wait for this one
            logger.warning("The memory of a step could not be reported; the run goes on.", exc_info=True)
            return None

    def _tell(self, report: MemoryReport, totals: Sequence[Any]) -> None:
        self._write(report, totals)
        text = "\n".join([*report.headlines(), *_others(totals)])
        self.emit(Noted(step=report.step, title="memory", text=text))

    def _write(self, report: MemoryReport, totals: Sequence[Any]) -> None:
        path = self._folder.memory / f"step_{report.step:06}.json"
        text = "\n".join([f"step {report.step}, rank {report.rank}, {report.device}", str(report), *_others(totals)])
        try:
            with replacing(path.with_suffix(".txt")) as unfinished:
                unfinished.write_text(text + "\n", encoding="utf-8")
            with replacing(path) as unfinished:
                unfinished.write_text(json.dumps({**report.to_json(), "ranks": list(totals)}) + "\n", encoding="utf-8")
            write_memory_picture(report, self._folder.memory_picture)
        except StoreError as exc:
            logger.warning("The memory report is not kept: %s The run goes on.", exc)
        except DependencyError as exc:
            logger.warning("%s The report is written without it.", exc)


def _totals(report: MemoryReport) -> dict[str, Any]:
    return {
        "rank": report.rank,
        "device": report.device,
        "peak_bytes": report.peak_bytes,
        "peak_phase": report.peak_phase,
        "begin_bytes": report.begin_bytes,
        "end_bytes": report.end_bytes,
        "cache_bytes": report.cache_bytes,
        "grows_bytes_per_step": report.growth.bytes_per_step,
    }


def _others(totals: Sequence[Any]) -> list[str]:
    """A line for the other ranks: the least and the most of their peaks, and those that grow."""
    peaks = {each["rank"]: each["peak_bytes"] for each in totals if each is not None and each["rank"] != 0}
    if not peaks:
        return []
    least, most = min(peaks, key=lambda rank: peaks[rank]), max(peaks, key=lambda rank: peaks[rank])
    lines = [f"rank {least}: peak {readable_bytes(peaks[least])}"]
    if least != most:
        lines = [f"other ranks: peaks from {readable_bytes(peaks[least])} (rank {least}) "]
        lines[0] += f"to {readable_bytes(peaks[most])} (rank {most})"
    if growing := [
        each["rank"] for each in totals if each is not None and each["rank"] and each["grows_bytes_per_step"]
    ]:
        lines.append(f"memory grows also on rank {', '.join(map(str, growing))}")
    return lines
