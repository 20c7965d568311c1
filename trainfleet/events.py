"""What happened in a run, and anyone who wants to know.

Loops emit, observers listen. Events hold plain numbers and strings, never tensors, so that an
observer can keep, print or send them; an observer that fails is logged once and never stops a run.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from trainfleet import courier
from trainfleet.courier import Courier
from trainfleet.stopwatch import timed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """The root of all events."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted(Event):
    folder: str | None
    """The run folder, or None when nothing is written."""
    steps: int
    """The optimizer steps this run will have taken when it is done."""
    start_step: int
    """The first step to take: 0, or where a checkpoint left off."""
    world_size: int
    parameters: int
    """Elements of all parameters of the whole model."""
    plan: str
    """The plan in one line."""
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEnded(Event):
    step: int
    """Steps taken so far: 1 after the first."""
    loss: float
    """Mean over the weights of all ranks."""
    learning_rate: float
    grad_norm: float | None
    """Before clipping, over the whole mesh; None where it was not computed."""
    samples: int
    """Of all ranks in this step."""
    tokens: int
    """Of all ranks in this step: the elements of the labels, or the samples."""
    seconds: float
    """Wall time of the whole step on this rank."""
    data_seconds: float
    """Of which this rank waited for batches."""
    between_seconds: float = 0.0
    """From the end of the step before until this one began, on this rank: evaluation, saves, observers."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """Where `between_seconds + seconds` went: seconds by phase (`stopwatch.PHASES`), which add up to them."""
    waits: Mapping[str, float] = field(default_factory=dict)
    """What it waited for, in seconds: source, transform, network; data: not known. Empty where nobody measured."""
    received_bytes: int = 0
    """Of batches that feeders sent to this rank for this step."""
    ready: int | None = None
    """Batches of feeders that wait here for the next step; None without feeders."""
    skipped: bool = False
    """True where an overflow of fp16 made every rank skip the update."""
    loss_scale: float | None = None
    memory_bytes: int = 0
    """Resident memory of this process, or the peak allocation of its GPU."""
    mfu: float | None = None
    """Model FLOPs utilisation of all devices, of 1; None where it is not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated(Event):
    step: int
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracked(Event):
    """A number of the user's own."""

    step: int
    name: str
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RanksReported(Event):
    """What each rank measured over the last steps."""

    step: int
    steps: int
    """How many steps it is about, up to `step`."""
    ranks: Sequence[Mapping[str, Any]]
    """By rank: `host`, `device`, `seconds`, `phases` (seconds by phase of these steps), `memory_bytes`, `private_bytes`
    (of main memory, beside pages of files), `system` (numbers of the machine, by name; empty where another rank of the
    host tells them), and `found` where its watchers have found something."""


ANOMALIES = (
    "loss_not_finite",
    "gradient_not_finite",
    "loss_spike",
    "gradient_explosion",
    "dead_units",
    "throughput_drop",
    "stalled_step",
    "slow_rank",
    "data_starvation",
    "disk_filling",
    "memory_growth",
)
"""Their kinds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnomalySeen(Event):
    step: int
    """The step under way: one that is skipped has it, one that is rolled back is taken again under it."""
    kind: str
    """One of ANOMALIES."""
    what: str
    """A sentence with the figures."""
    policy: str
    """What was done about it: warn, skip, rollback, stop."""
    rank: int | None = None
    """On which rank it arose; None where it is about all of them."""
    module: str | None = None
    """The first module that produced it, where that is known."""
    samples: Sequence[int] | None = None
    """The samples of the dataset that it arose from, where they are known."""
    path: str | None = None
    """What was saved for a replay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnomalyOver(Event):
    """One that lasted does so no more."""

    step: int
    kind: str
    what: str
    """A sentence with the figures."""
    rank: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AlertFired(Event):
    step: int
    alert: str
    """As it stands in the recipe."""
    value: float
    """The one that it was about, as it is now; NaN where it is about an anomaly."""
    text: str = ""
    """A sentence that says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved(Event):
    step: int
    path: str
    seconds: float
    """How long the loop was blocked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFailed(Event):
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored(Event):
    step: int
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesSkipped(Event):
    """Bad samples that were left out because the recipe says so."""

    count: int
    example: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Noted(Event):
    """A text for the person: a generated sample, a remark."""

    step: int
    title: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnded(Event):
    step: int
    reason: str
    """`finished`, `stopped early`, `interrupted`, or the sentence of an error."""
    seconds: float
    summary: Mapping[str, float | str] = field(default_factory=dict)
    lost_peer: bool = False
    """True where this rank ended only because another had: whoever starts them anew waits for it."""


class Observer(Protocol):
    """Anyone who wants to know.

    One whose class says `in_loop = True` is called by the loop itself, however long it takes. Any other is called in a
    thread beside the loop, which waits for it, up to a deadline. One with a method `meet(observers)` is given the
    Observers it was added to, to tell the others something.
    """

    def on_event(self, event: Event) -> None: ...


class Observers:
    """Tells each event to each observer in turn; a failing one is logged once and heard no more of.

    One that has not returned after `deadline_seconds` is left out from then on, with a warning; what it missed is
    counted and said at the end.
    """

    def __init__(self, observers: Iterable[Observer] = (), *, deadline_seconds: float = 60.0) -> None:
        self.deadline_seconds = deadline_seconds
        self._observers: list[Observer] = []
        self._failed: set[int] = set()
        self._missed: dict[int, int] = {}
        self._courier: Courier | None = None
        for observer in observers:
            self.add(observer)

    def add(self, observer: Observer) -> None:
        self._observers.append(observer)
        if (meet := getattr(observer, "meet", None)) is not None:
            meet(self)

    def emit(self, event: Event) -> None:
        with timed("observers"):
            for observer in self._observers:
                if id(observer) in self._missed:
                    self._missed[id(observer)] += 1
                elif not self._call(observer, partial(self._tell, observer, event), about=type(event).__name__):
                    self._missed[id(observer)] = 1

    def close(self) -> None:
        """Close those that can be closed, and say what those that were left out have missed."""
        for observer in self._observers:
            if (missed := self._missed.get(id(observer))) is not None:
                logger.warning("Observer %s missed the last %d events.", type(observer).__name__, missed)
            elif (close := getattr(observer, "close", None)) is not None:
                self._call(observer, partial(_close, observer, close), about="close")
        self._observers = []  # some of them know these
        if self._courier is not None:
            self._courier.end()
            self._courier = None

    def _tell(self, observer: Observer, event: Event) -> None:
        try:
            observer.on_event(event)
        except Exception:
            if id(observer) not in self._failed:
                self._failed.add(id(observer))
                logger.warning(
                    "Observer %s failed on %s; the run goes on, and further failures of it are not shown.",
                    type(observer).__name__,
                    type(event).__name__,
                    exc_info=True,
                )

    def _call(self, observer: Observer, function: Callable[[], None], *, about: str) -> bool:
        """Call `function` where this observer is called; False if that did not return in time, or is not wanted."""
        in_loop = getattr(observer, "in_loop", False)
        if (here := courier.current()) is not None:  # an observer tells the others something
            try:
                with here.speaking() if in_loop else here.calling(observer):
                    function()
            except courier.NotHeard:
                return True
            return True
        if in_loop:
            function()
            return True
        while True:
            if self._courier is None or not self._courier.is_usable:
                self._courier = Courier()
                weakref.finalize(self, self._courier.end)
            try:
                self._courier.call(function, caller=observer, deadline_seconds=self.deadline_seconds)
                return True
            except courier.Blocked as blocked:
                self._leave_out(blocked.callers, about)
                if id(observer) in self._missed:
                    return False

    def _leave_out(self, blocking: tuple[object, ...], about: str) -> None:
        for observer in blocking:
            self._missed.setdefault(id(observer), 0)
        logger.warning(
            "Observer %s has not returned from %s in %g s; the run goes on without it. Do what takes long in a thread "
            "of your own, raise monitor.observer_deadline_seconds, or give its class `in_loop = True` if the run is to "
            "wait for it.",
            " in ".join(type(observer).__name__ for observer in reversed(blocking)),
            about,
            self.deadline_seconds,
        )


def _close(observer: Observer, close: Callable[[], None]) -> None:
    try:
        close()
    except Exception:
        logger.warning("Observer %s failed to close.", type(observer).__name__, exc_info=True)
