"""All feeders of one rank as a pool: whoever is free makes the next batch, and none is lost with a feeder."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta

from trainfleet.data.feed.answer import difference_of, parsed_answer, timed
from trainfleet.data.feed.feeder import Feeder, Told
from trainfleet.data.feed.terms import Offer, Unit
from trainfleet.data.samples import Made
from trainfleet.errors import DataError, NotAdmitted
from trainfleet.net.channel import Message
from trainfleet.net.peers import Connect, Ways
from trainfleet.net.pool import Asked, Pool

logger = logging.getLogger(__name__)

_LEAST_AHEAD = 2


class Feeders(Pool[Unit, Made | Exception]):
    """Makes units, for any number of streams (lane.py); the numbers of their tasks are drawn from `numbers`.

    Closed when each of those who share it has called `close`.
    """

    def __init__(self, ways: Ways, *, timeout: timedelta, buffer_bytes: int) -> None:
        self.numbers = itertools.count()
        self._buffer_bytes, self._channel = buffer_bytes, ways.channel
        super().__init__(
            ways,
            self._feeder,
            role="trainer",
            admits="feeder",
            called="Feeder",
            timeout=timeout,
            remedy="Start one with `trainfleet feed`, or look at its address with `trainfleet doctor HOST:PORT`.",
        )
        self._asked: dict[int, float] = {}  # when somebody was last asked for it
        self._offers: dict[str, Offer] = {}
        self._starved = False  # whether the loop had to wait for its last batch
        self._users = 1
        self._peers.open()

    def offer(self, stream: str) -> Offer:
        """What the first feeder offers of `stream`; DataError if it has none, PeerError if none is there in time."""
        self._peers.wait(lambda: bool(self._offers), "the first feeder")
        if stream not in self._offers:
            raise DataError(
                f"The feeders have no stream {stream!r}, but {', '.join(self._offers)}. "
                "Give the data service one, or evaluate on data of this host."
            )
        return self._offers[stream]

    @property
    def offers(self) -> dict[str, Offer]:
        """What the first feeder offered, and every other since."""
        return dict(self._offers)

    @property
    def depth(self) -> int:
        """Units to be under way: what the feeders can have, within the bytes that may wait here."""
        with self._changed:
            room, unit = self._leases.room, self._leases.unit_bytes
        if unit:
            room = min(room, int(self._buffer_bytes / unit))
        return max(_LEAST_AHEAD, room)

    def receive(self, task: int) -> Made:
        """The batch of a submitted task, once. Raises DataError where making it failed, PeerError as `take` does."""
        self._starved = not self.has(task)
        found = self.take(task, "a batch")
        if isinstance(found, Exception):
            raise found
        return found

    def ready_among(self, tasks: Iterable[int]) -> int:
        """How many of these are here."""
        with self._changed:
            return sum(map(self.has, tasks))

    def drop(self, tasks: Sequence[int]) -> None:
        super().drop(tasks)
        with self._changed:
            for task in tasks:
                self._asked.pop(task, None)

    def share(self) -> Feeders:
        """This pool for one more stream, which closes it too."""
        self._users += 1
        return self

    @property
    def is_open(self) -> bool:
        return self._users > 0

    def close(self) -> None:
        self._users = max(0, self._users - 1)
        if not self._users:
            super().close()

    # on the feeders' threads

    def joined(self, feeder: Feeder, told: Told) -> None:
        with self._changed:
            self._offers = self._offers or told.streams
            if difference := difference_of(feeder.name, told.streams, self._offers):
                raise NotAdmitted(difference)
            self._leases.join(feeder, room=2 * max(1, told.workers) + 2)
        self._peers.joined(feeder.name)
        logger.info("Feeder %s on %s is here, with %d workers.", feeder.name, told.host, told.workers)
        self._hand_out()

    def made(self, feeder: Feeder, message: Message, num_bytes: int) -> None:
        task, made = parsed_answer(message)
        with self._changed:
            now = time.monotonic()
            made = timed(made, message, now - self._asked.pop(task, now), num_bytes)
        self.take_in(feeder, task, made, num_bytes, idle=self._starved and message.head.get("idle") is True)
        if isinstance(made, Made) and made.way is not None:
            feeder.arrived(task, round(made.way.transit, 6))

    # between them

    def _feeder(self, name: str, connect: Connect, again: bool) -> Feeder:
        return Feeder(name, connect, self, self._channel, again=again)

    def _ask(self, given: Sequence[tuple[Asked, int, Unit]]) -> None:
        now = time.monotonic()
        for _, task, _ in given:
            self._asked[task] = now
        super()._ask(given)
