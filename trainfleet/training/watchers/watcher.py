"""Watchers: what looks at each step from inside, on every rank, and may judge it before its update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias, get_args

from trainfleet.batch import Batch
from trainfleet.errors import AnomalyStopped
from trainfleet.events import AnomalyOver, AnomalySeen, Event, StepEnded
from trainfleet.parallel import Engine

Policy: TypeAlias = Literal["warn", "skip", "rollback", "stop"]
"""The further right, the graver."""
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnderWay:
    """A step whose gradient is there, and whose update is not."""

    step: int
    """The number that it will have: 1 is the first."""
    micro_batches: Sequence[Batch]
    """As the stream gave them to this rank."""
    engine: Engine
    loss: float
    """Of all ranks."""
    grad_norm: float
    """Before clipping, over the whole mesh."""
    loss_scale: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What is wrong with a step, and what is to be done about it."""

    policy: Policy
    kind: str
    """One of `events.ANOMALIES`."""
    what: str
    """A sentence without its full stop."""
    rank: int | None = None
    module: str | None = None
    samples: Sequence[int] | None = None
    path: str | None = None
    is_news: bool = True
    """False where it is the same anomaly as at the step before, and was told then."""
    is_over: bool = False
    """True where it says that an anomaly is over; then nothing is wrong."""

    def error(self, step: int) -> AnomalyStopped:
        """What ends the run under `stop`."""
        return AnomalyStopped(
            f"{self.what} in step {step}, and monitor.anomalies.{self.kind} says what to do: stop.",
            hint="Look at what lies behind it, then give the same command again: it goes on from before that step.",
        )

    def event(self, step: int) -> AnomalySeen | AnomalyOver:
        if self.is_over:
            return AnomalyOver(step=step, kind=self.kind, what=self.what, rank=self.rank)
        return AnomalySeen(
            step=step,
            kind=self.kind,
            what=self.what,
            policy=self.policy,
            rank=self.rank,
            module=self.module,
            samples=self.samples,
            path=self.path,
        )


class Watcher:
    """Does nothing; override what is wanted. Called on every rank, in the thread of the loop."""

    emit: Callable[[Event], None] = staticmethod(lambda event: None)
    """Tells the observers of the run that it is in."""

    def start(self, engine: Engine) -> None:
        """The loop begins."""

    def begin(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """The batches of `step` are there, and nothing of it is computed."""

    def judge(self, under_way: UnderWay) -> Judgement | None:
        """What is wrong with the step, if anything. All ranks answer alike: by what all know, or after asking."""
        return None

    def give_up(self) -> None:
        """The step that was judged brings no update: it is skipped, or the run stops and saves what was before it."""

    def end(self, ended: StepEnded) -> None:
        """The step was taken, or skipped. Of a step that is rolled back nothing more is heard."""

    def tell(self) -> list[dict[str, Any]]:
        """What this rank has to tell all others with the report that is due, as JSON can hold it."""
        return []

    def hear(self, event: Event) -> None:
        """What the observers are told too. Of all events a RanksReported is the same on all ranks; what they have told
        stands in it under `found`."""

    def close(self) -> None:
        """The loop has ended."""


class Watchers:
    """Asks each in turn. It is an observer, so that they hear what observers hear."""

    in_loop = True

    def __init__(self, watchers: Sequence[Watcher], emit: Callable[[Event], None]) -> None:
        self._watchers, self._emit = tuple(watchers), emit
        for watcher in self._watchers:
            watcher.emit = emit

    def __enter__(self) -> Watchers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for watcher in self._watchers:
            watcher.close()

    def start(self, engine: Engine) -> None:
        for watcher in self._watchers:
            watcher.start(engine)

    def begin(self, step: int, micro_batches: Sequence[Batch]) -> None:
        for watcher in self._watchers:
            watcher.begin(step, micro_batches)

    def judge(self, under_way: UnderWay) -> Judgement | None:
        """The gravest judgement, the first of equals; all that are news are told."""
        judgements = [each for watcher in self._watchers if (each := watcher.judge(under_way)) is not None]
        for each in judgements:
            if each.is_news:
                self._emit(each.event(under_way.step))
        gravest = max(judgements, key=lambda each: POLICIES.index(each.policy), default=None)
        if gravest is not None and gravest.policy in ("skip", "stop"):
            for watcher in self._watchers:
                watcher.give_up()
        return gravest

    def end(self, ended: StepEnded) -> None:
        for watcher in self._watchers:
            watcher.end(ended)

    def tell(self) -> list[dict[str, Any]]:
        return [each for watcher in self._watchers for each in watcher.tell()]

    def on_event(self, event: Event) -> None:
        for watcher in self._watchers:
            watcher.hear(event)
