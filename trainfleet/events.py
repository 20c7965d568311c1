"""What happened in a run, and anyone who wants to know.

Loops emit, observers listen. Events hold plain numbers and strings, never tensors, so that an
observer can keep, print or send them; an observer that fails is logged once and never stops a run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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
    """By rank: `host`, `device`, `seconds`, `phases` (seconds by phase of these steps), `memory_bytes`, `system`
    (numbers of the machine, by name; empty where another rank of the host tells them)."""


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
class AlertFired(Event):
    step: int
    alert: str
    """As it stands in the recipe."""
    value: float
    """The one that it was about, as it is now."""


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
    """Anyone who wants to know."""

    def on_event(self, event: Event) -> None: ...


class Observers:
    """Tells each event to each observer in turn; a failing one is logged once and heard no more of."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers: list[Observer] = list(observers)
        self._failed: set[int] = set()

    def add(self, observer: Observer) -> None:
        self._observers.append(observer)

    def emit(self, event: Event) -> None:
        with timed("observers"):
            for observer in self._observers:
                self._tell(observer, event)

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

    def close(self) -> None:
        """Close those that can be closed."""
        for observer in self._observers:
            close = getattr(observer, "close", None)
            if close is not None:
                try:
                    close()
                except Exception:
                    logger.warning("Observer %s failed to close.", type(observer).__name__, exc_info=True)
