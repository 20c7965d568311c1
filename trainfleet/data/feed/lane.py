"""One stream's part of a pool of feeders: several streams may have one connection to each of them."""

from __future__ import annotations

from trainfleet.data.feed.feeders import Feeders
from trainfleet.data.feed.terms import Terms, Unit
from trainfleet.data.sampler import Span
from trainfleet.data.samples import Made


class Lane:
    """A Pool over the network. Its tasks have numbers of their own among those of all lanes."""

    def __init__(self, feeders: Feeders, terms: Terms) -> None:
        self._feeders, self._terms = feeders, terms
        self._numbers: dict[int, int] = {}  # by task, the number that feeders know it by

    def submit(self, task: int, span: Span) -> None:
        number = self._numbers[task] = next(self._feeders.numbers)
        self._feeders.submit(number, Unit(span.epoch, span.begin, span.end, self._terms))

    def receive(self, task: int) -> Made:
        """The batch of a submitted task; as `Feeders.receive` where it fails, after which `forget` is due."""
        made = self._feeders.receive(self._numbers[task])
        del self._numbers[task]
        return made

    def forget(self) -> None:
        numbers, self._numbers = list(self._numbers.values()), {}
        self._feeders.drop(numbers)

    def close(self) -> None:
        """The feeders stay: whoever opened them closes them."""
        self.forget()

    @property
    def ready(self) -> int:
        """Batches that are here and wait for the loop."""
        return self._feeders.ready_among(self._numbers.values())

    @property
    def pids(self) -> list[int]:
        return []
