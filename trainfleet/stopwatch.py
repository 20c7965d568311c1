"""Stopwatch: where the time of a step goes. A moment belongs to the innermost phase that is open, and to no other.

    with Stopwatch() as watch:
        with timed("forward"):
            ...
            with timed("communication"):    # the forward stands still for as long
                ...
        watch.take()                        # {"forward": 0.031, "communication": 0.004, "other": 0.001, ...}

The phases that `take` gives add up to the time since the `take` before. A device that works behind the host has a
clock of its own: `DeviceStopwatch`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol

PHASES = (
    "data",
    "transfer",
    "forward",
    "backward",
    "communication",
    "optimizer",
    "evaluation",
    "checkpoint",
    "observers",
    "other",
)
"""In the order of a step. `data` waits for batches, `transfer` brings them to the device, `communication` waits for
other ranks, `checkpoint` is what a save takes of the loop, `other` is the loop itself."""
PRODUCTIVE = ("forward", "backward", "communication", "optimizer")
"""Those that goodput counts: see monitor/history/goodput.py."""
WHOLE = ("evaluation", "checkpoint", "observers")
"""Phases inside these are theirs."""


class _Running(threading.local):
    """A rank is a process, or a thread: each has its own."""

    watch: Stopwatch | None = None


_running = _Running()
_lent: DeviceStopwatch | None = None
"""While it is in a backward, to threads that Python has not started: torch computes that of a device in such."""


def _lent_here() -> DeviceStopwatch | None:
    return _lent if threading.current_thread().name.startswith("Dummy-") else None


def running() -> Stopwatch | None:
    """The one that runs in this thread; another thread may ask it for its phase."""
    return _running.watch


class Stopwatch:
    """Runs while it is entered, for the thread that entered it."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._open: list[str] = ["other"]
        self.taken_at = self._since = perf_counter()
        """When `take` was called last, or it was entered; a `time.perf_counter`."""
        self._before: Stopwatch | None = None
        self._range: Callable[[str], AbstractContextManager[Any]] | None = None
        self._ranges: list[tuple[int, AbstractContextManager[Any]]] = []  # with the number of phases open in it

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last `take`, or since it was entered; open phases go on."""
        self._count()
        self.taken_at = self._since
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken

    @property
    def phase(self) -> str:
        """The innermost that is open; another thread may ask."""
        return self._open[-1]

    def open(self, phase: str) -> None:
        self._count()
        self._open.append(self._open[-1] if self._open[-1] in WHOLE else phase)
        if self._range is not None:
            self._ranges.append((len(self._open), self._range(self._open[-1])))
            self._ranges[-1][1].__enter__()

    def close(self) -> None:
        if self._ranges and self._ranges[-1][0] == len(self._open):
            self._ranges.pop()[1].__exit__(None, None, None)
        self._count()
        self._open.pop()

    def _count(self) -> None:
        now = perf_counter()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def __enter__(self) -> Stopwatch:
        self._before, _running.watch = _running.watch, self
        self._open, self._since = ["other"], perf_counter()
        self.taken_at = self._since
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _running.watch = self._before


class Marks(Protocol):
    """Moments of a device that works through a queue behind the host."""

    def mark(self) -> Any:
        """The moment when it will have done all that it has been told until now."""
        ...

    def seconds(self, earlier: Any, later: Any) -> float | None:
        """From one to the next, which then is `earlier`; at once, so None where it has not come to `later` yet."""
        ...


class DeviceStopwatch(Stopwatch):
    """Counts the time of a device, which stands still while the host is behind with its orders.

    Nothing waits for the device: `take` gives the phases up to the last mark that it has reached, and what is left of
    a step, mostly its update, counts in the next one.
    """

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self._marks = marks
        self._last: Any = None
        self._ahead: deque[tuple[str, Any]] = deque()  # phases that the device may not have left yet, and where it will

    def take(self) -> dict[str, float]:
        self._count()
        self.taken_at = perf_counter()
        taken = dict.fromkeys(PHASES, 0.0)
        while self._ahead:
            phase, mark = self._ahead[0]
            seconds = self._marks.seconds(self._last, mark)
            if seconds is None:
                break
            taken[phase] += seconds
            self._last = mark
            self._ahead.popleft()
        return taken

    def open(self, phase: str) -> None:
        global _lent
        super().open(phase)
        if phase == "backward":
            _lent = self

    def close(self) -> None:
        global _lent
        super().close()
        if "backward" not in self._open:
            _lent = None

    def _count(self) -> None:
        self._ahead.append((self._open[-1], self._marks.mark()))

    def __enter__(self) -> DeviceStopwatch:
        super().__enter__()
        self._last = self._marks.mark()
        self._ahead.clear()
        return self


class timed:
    """Inside, time belongs to `phase`, one of PHASES, if a Stopwatch runs in this thread; else it costs nothing."""

    __slots__ = ("_phase", "_watch")

    def __init__(self, phase: str) -> None:
        self._phase = phase

    def __enter__(self) -> None:
        self._watch = _running.watch or (_lent and _lent_here())
        if self._watch is not None:
            self._watch.open(self._phase)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is not None:
            self._watch.close()


@contextmanager
def marked(mark: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside, each phase that begins is also a `mark(phase)`, entered and left with it: so a profiler sees phases.

    It is so for the Stopwatch of this thread; without one there are none.
    """
    watch = _running.watch
    if watch is None:
        yield
        return
    before, watch._range = watch._range, mark
    try:
        yield
    finally:
        watch._range = before
