"""Profile: traces a few steps by torch's profiler, for Perfetto and for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainfleet.monitor.profiling.account import Account
from trainfleet.monitor.profiling.allocations import MODULE, PHASE, Range, followed_in
from trainfleet.monitor.profiling.memory_report import MemoryReport, aligned
from trainfleet.monitor.profiling.operators import module_table, operator_table
from trainfleet.monitor.profiling.torch_profiler import new_profiler
from trainfleet.stopwatch import PHASES
from trainfleet.store import replacing

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class Profile:
    """Traces the steps between `record` and `stop`, after one that warms the profiler up from `start` on.

    In the trace, phases are ranges `phase: NAME` and the forward of each module is a range `module: NAME`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        *,
        with_stack: bool = False,
        step: int = 0,
        rank: int = 0,
    ) -> None:
        """`step` is the number of steps taken so far."""
        self._account = Account(model, optimizer, step=step, rank=rank)
        self._with_stack = with_stack
        self._profiler: Any = None
        self._is_recording = False
        self._report: MemoryReport | None = None

    @property
    def steps(self) -> int:
        """Recorded so far; a part of one counts."""
        return max(self._account.num_steps, 1)

    def start(self, *, warm_up: bool) -> None:
        """Begin with a step that warms up, or record at once. RuntimeError where a profiler of torch runs already."""
        self._profiler = new_profiler(with_stack=self._with_stack, of_devices=True)
        self._profiler.prepare_trace()
        self._account.open()
        if not warm_up:
            self._record()

    def step(self) -> None:
        """A step has ended."""
        if self._is_recording:
            self._account.end_step()
        else:
            self._record()

    def stop(self) -> bool:
        """End; whether anything was recorded."""
        self._account.close()
        was_recording = self._is_recording
        if not was_recording:
            self._profiler.start_trace()  # a prepared profiler is ended only by way of a trace
        self._is_recording = False
        self._profiler.stop_trace()
        return was_recording

    def write(self, trace: Path) -> None:
        """The trace, as JSON in gzip, in place of an older one. StoreError where it cannot be written."""
        with replacing(trace) as unfinished:
            self._profiler.export_chrome_trace(str(unfinished))
            if not unfinished.is_file():
                raise OSError("torch could not export it")

    def memory_report(self) -> MemoryReport:
        """The memory of all that was recorded, as one step."""
        if self._report is None:
            if not self._account.num_steps:
                self._account.end_step()
            seen = followed_in(self._profiler.profiler.kineto_results.experimental_event_tree())
            self._report = self._account.report(seen, whole=True)
        return self._report

    def operators(self) -> str:
        """Phases, operators and modules in what was recorded, in milliseconds a step."""
        ranges = [
            Range(event.name, event.time_range.start * 1000, event.time_range.end * 1000)
            for event in self._profiler.events()
            if event.name.startswith((PHASE, MODULE)) and event.device_type.name == "CPU"
        ]
        modules = [each for each in ranges if each.name.startswith(MODULE)]
        lines = [f"{self.steps} step{'s' * (self.steps != 1)}; times and calls are those of one", ""]
        lines += [*self._phase_table(), ""]
        lines += operator_table(self._profiler.key_averages(), steps=self.steps)
        if modules:
            lines += ["", *module_table(modules, steps=self.steps)]
        return "\n".join(lines) + "\n"

    def _phase_table(self) -> list[str]:
        line = self.memory_report().timeline
        seconds = dict.fromkeys(PHASES, 0.0)
        for name, begin, end in line.phases:
            seconds[name] = seconds.get(name, 0.0) + end - begin
        rows = [["phase", "ms"]]
        rows += [[name, f"{took * 1000 / self.steps:.3f}"] for name, took in seconds.items() if took]
        return aligned(rows)

    def _record(self) -> None:
        self._account.begin()
        self._profiler.start_trace()
        self._is_recording = True
