"""Watchers: what looks at each step from inside, on every rank, and may judge it before its update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from trainfleet.batch import Batch
from trainfleet.events import AnomalySeen, Event, StepEnded
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

    def event(self, step: int) -> AnomalySeen:
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

    def begin(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """The batches of `step` are there, and nothing of it is computed."""

    def judge(self, under_way: UnderWay) -> Judgement | None:
        """What is wrong with the step, if anything. All ranks answer alike: by what all know, or after asking."""
        return None

    def end(self, ended: StepEnded) -> None:
        """The step was taken, or skipped. Of a step that is rolled back nothing more is heard."""

    def close(self) -> None:
        """The run has ended."""


class Watchers:
    """Asks each in turn."""

    def __init__(self, watchers: Sequence[Watcher], emit: Callable[[Event], None]) -> None:
        self._watchers, self._emit = tuple(watchers), emit

    def begin(self, step: int, micro_batches: Sequence[Batch]) -> None:
        for watcher in self._watchers:
            watcher.begin(step, micro_batches)

    def judge(self, under_way: UnderWay) -> Judgement | None:
        """The gravest judgement, the first of equals; all of them are told."""
        judgements = [each for watcher in self._watchers if (each := watcher.judge(under_way)) is not None]
        for each in judgements:
            self._emit(each.event(under_way.step))
        return max(judgements, key=lambda each: POLICIES.index(each.policy), default=None)

    def end(self, ended: StepEnded) -> None:
        for watcher in self._watchers:
            watcher.end(ended)

    def close(self) -> None:
        for watcher in self._watchers:
            watcher.close()
