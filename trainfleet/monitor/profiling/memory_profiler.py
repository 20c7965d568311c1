"""MemoryProfiler: follows a few steps and reports where their memory went."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from trainfleet.monitor.profiling.account import Account
from trainfleet.monitor.profiling.allocations import Allocations, Followed
from trainfleet.monitor.profiling.memory_report import MemoryReport

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class MemoryProfiler:
    """Reports the memory of the steps that are taken while it is entered; `step()` ends each of them.

        with MemoryProfiler(model, optimizer) as profiler:
            for inputs, labels in batches[:4]:
                loss_fn(model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
                profiler.step()
        print(profiler.get_memory_report())

    The last step is reported by phase and module, and over four steps or more what grows. Such steps take a few times
    as long; nothing is left behind that would slow others. Without `model` and `optimizer` nothing has their names.
    """

    def __init__(
        self, model: nn.Module | None = None, optimizer: Optimizer | None = None, *, step: int = 0, rank: int = 0
    ) -> None:
        """`step` is the number of steps taken so far, `rank` that of this process; both stand in the report."""
        self._account = Account(model, optimizer, step=step, rank=rank)
        self._allocations = Allocations()
        self._report: MemoryReport | None = None

    def start(self, batch: Any = None) -> None:
        """Begin to follow. RuntimeError where another profiler of torch runs already. `batch` is there already."""
        self._allocations.start()
        self._account.begin(batch)
        self._account.open()

    def look(self) -> None:
        """See who holds what now; a loop may call it where gradients are whole, if its optimizer is none of torch's."""
        self._account.look()

    def step(self) -> None:
        """The step under way has ended."""
        self._account.end_step()

    def stop(self) -> None:
        """End following; the report is made now."""
        if not self._account.num_steps:
            self._account.end_step()
        try:
            followed = self._allocations.stop()
        finally:
            self._account.close()
        self._report = self._account.report(followed)

    def get_memory_report(self) -> MemoryReport:
        """Of the last step that was followed; before the first, of what tensors hold now."""
        if self._report is not None:
            return self._report
        self._account.begin()
        return self._account.report(Followed((), (), (), ()))

    def __enter__(self) -> MemoryProfiler:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
