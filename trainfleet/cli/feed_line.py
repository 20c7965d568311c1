"""How a feeder is doing, in a line: rates, what waits, where the time goes, how far the epoch is."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from trainfleet.data.feed.times import Spent, shares
from trainfleet.monitor.units import percentages, readable_bytes, readable_duration

if TYPE_CHECKING:
    from trainfleet.data.feed.service import DataService, Served

_WINDOW_SECONDS = 10.0
"""Over which rates are taken."""


class FeedLine:
    """Called now and then, says how it goes."""

    def __init__(self, service: DataService) -> None:
        self._service = service
        self._looks: deque[tuple[float, Served]] = deque([(time.monotonic(), service.served)])
        self._asked_seconds, self._asked_spent = 0.0, Spent()  # of the time in which trainers asked for batches

    def __call__(self, _: float = 0.0) -> str:
        served, now = self._service.served, time.monotonic()
        self._account(*self._looks[-1], served, now)
        while len(self._looks) > 1 and now - self._looks[1][0] >= _WINDOW_SECONDS:
            self._looks.popleft()
        at, before = self._looks[0]
        self._looks.append((now, served))
        return self._words(before, served, max(now - at, 1e-9))

    @property
    def whole(self) -> str:
        """Where the time went in which trainers asked for batches, as far as it was called; empty if none ever did."""
        if not self._asked_seconds:
            return ""
        return _in_words(Spent(), self._asked_spent, self._asked_seconds, self._looks[-1][1].workers)

    def _account(self, at: float, before: Served, served: Served, now: float) -> None:
        if served.batches > before.batches or before.waiting:
            self._asked_seconds += now - at
            more = [new - old for new, old in zip(served.spent, before.spent)]
            self._asked_spent = Spent(*(sum(pair) for pair in zip(self._asked_spent, more)))

    def _words(self, before: Served, served: Served, seconds: float) -> str:
        rate = (served.batches - before.batches) / seconds
        words = [
            f"{rate:,.1f} batches/s",
            f"{readable_bytes((served.num_bytes - before.num_bytes) / seconds)}/s",
        ]  # what matters most comes first: a terminal may be narrow
        if rate > 0:
            words.append(_in_words(before.spent, served.spent, seconds, served.workers))
        if served.reached is not None:
            words.append(self._epoch(before.reached, served.reached, seconds))
        words.append(f"{served.trainers} connection{'s' * (served.trainers != 1)}")
        return "  ".join([*words, f"{served.waiting} waiting", f"{served.batches:,} batches"])

    def _epoch(self, before: tuple[int, int] | None, reached: tuple[int, int], seconds: float) -> str:
        """`epoch 3 at 45%, 1:20 left`: of the trainer that is farthest."""
        samples = self._service.offers["training"].samples
        epoch, position = reached
        words = f"epoch {epoch + 1} at {position / samples:.0%}"
        before = before or (0, 0)
        gone = (epoch - before[0]) * samples + position - before[1]
        return f"{words}, {readable_duration((samples - position) * seconds / gone)} left" if gone > 0 else words


def _in_words(before: Spent, now: Spent, seconds: float, workers: int) -> str:
    """`62% source 30% transform 5% network 3% waits for trainers`: of the workers' time, 100 together."""
    parts = percentages(shares(before, now, seconds=seconds, workers=workers))
    return " ".join(f"{share}% {name}" for name, share in parts.items())
