"""All feeders of one rank as a pool: whoever is free makes the next batch, and none is lost with a feeder."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Hashable, Iterable, Sequence
from datetime import timedelta

from trainfleet.data.feed.answer import difference_of, parsed_answer, timed
from trainfleet.data.feed.feeder import Feeder, Told
from trainfleet.data.feed.terms import Offer, Unit
from trainfleet.data.samples import Made
from trainfleet.errors import DataError, NotAdmitted, PeerError
from trainfleet.net.address import Address
from trainfleet.net.channel import Message
from trainfleet.net.lease import Leases
from trainfleet.net.peers import Connect, Peers, Ways

logger = logging.getLogger(__name__)

_LEAST_AHEAD = 2


class Feeders:
    """Makes units, for any number of streams (lane.py); the numbers of their tasks are drawn from `numbers`.

    Closed when each of those who share it has called `close`.
    """

    def __init__(self, ways: Ways, *, timeout: timedelta, buffer_bytes: int) -> None:
        self.numbers = itertools.count()
        self.repeated = 0
        """Units that were asked for anew, of another feeder or the same."""
        self.seconds_waited = 0.0
        """The loop's, for batches that were not here yet."""
        self._buffer_bytes, self._channel = buffer_bytes, ways.channel
        self._peers = Peers(
            ways,
            self._feeder,
            role="trainer",
            admits="feeder",
            timeout=timeout,
            remedy="Start one with `trainfleet feed`, or look at its address with `trainfleet doctor HOST:PORT`.",
        )
        self._changed = self._peers.changed
        self._leases: Leases[Unit] = Leases()
        self._done: dict[int, Made | Exception] = {}
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
    def address(self) -> Address | None:
        """Where feeders may connect to, with the port that was chosen; None if they are called."""
        return self._peers.address

    @property
    def connected(self) -> int:
        """Feeders that are here."""
        return self._leases.peers

    @property
    def lost(self) -> int:
        """Connections to feeders that ended by themselves."""
        return self._peers.lost

    @property
    def depth(self) -> int:
        """Units to be under way: what the feeders can have, within the bytes that may wait here."""
        with self._changed:
            room, unit = self._leases.room, self._leases.unit_bytes
        if unit:
            room = min(room, int(self._buffer_bytes / unit))
        return max(_LEAST_AHEAD, room)

    def submit(self, task: int, unit: Unit) -> None:
        with self._changed:
            self._leases.add(task, unit)
        self._hand_out()

    def receive(self, task: int) -> Made:
        """The batch of a submitted task, once. Raises DataError where making it failed, PeerError when no feeder was
        there, or none came to another sample, for the whole timeout."""
        begun = time.monotonic()
        self._starved = task not in self._done
        try:
            self._peers.wait(lambda: task in self._done, "a batch", lambda: self._hasten(task))
        finally:
            self.seconds_waited += time.monotonic() - begun
        with self._changed:
            found = self._done.pop(task)
        if isinstance(found, Exception):
            raise found
        return found

    def ready_among(self, tasks: Iterable[int]) -> int:
        """How many of these are here."""
        with self._changed:
            return sum(task in self._done for task in tasks)

    def forget(self, tasks: Iterable[int]) -> None:
        """Drop submitted tasks. Feeders are told where nothing else is wanted of them; else what they make of it is
        thrown away here."""
        tasks = list(tasks)
        with self._changed:
            self._leases.drop(tasks)
            for task in tasks:
                self._done.pop(task, None)
                self._asked.pop(task, None)
            idle = not len(self._leases)
        for feeder in self._peers.members if idle else ():
            assert isinstance(feeder, Feeder)
            feeder.forget()

    def share(self) -> Feeders:
        """This pool for one more stream, which closes it too."""
        self._users += 1
        return self

    @property
    def is_open(self) -> bool:
        return self._users > 0

    def close(self) -> None:
        self._users = max(0, self._users - 1)
        if self._users:
            return
        self._peers.close()
        with self._changed:
            self._done.clear()

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

    def left(self, feeder: Feeder, reason: PeerError) -> None:
        with self._changed:
            back = self._leases.leave(feeder)
            self.repeated += back
        self._peers.left(feeder.name, reason)
        logger.warning("Feeder %s is gone: %s %d batches are asked of others.", feeder.name, reason, back)
        self._hand_out()

    def made(self, feeder: Feeder, message: Message, num_bytes: int) -> None:
        task, made = parsed_answer(message)
        with self._changed:
            self._peers.moved()
            now = time.monotonic()
            made = timed(made, message, now - self._asked.pop(task, now), num_bytes)
            idle = self._starved and message.head.get("idle") is True
            if self._leases.arrived(feeder, task, now, num_bytes, idle=idle):
                self._done[task] = made
                self._changed.notify_all()
        if isinstance(made, Made) and made.way is not None:
            feeder.arrived(task, round(made.way.transit, 6))
        self._hand_out()

    def alive(self, feeder: Feeder, progress: object) -> None:
        self._peers.alive(feeder.name, progress)

    def given_up(self, feeder: Feeder, reason: Exception) -> None:
        with self._changed:
            self._leases.leave(feeder)
        self._peers.given_up(feeder.name, reason)
        logger.error("Feeder %s is given up: %s", feeder.name, reason)
        self._hand_out()

    # between them

    def _feeder(self, name: str, connect: Connect, again: bool) -> Feeder:
        return Feeder(name, connect, self, self._channel, again=again)

    def _hand_out(self) -> None:
        with self._changed:
            given = self._leases.give(time.monotonic())
        self._ask(given)

    def _hasten(self, task: int) -> None:
        with self._changed:
            given = self._leases.hasten(task, time.monotonic())
            self.repeated += len(given)
        self._ask(given)

    def _ask(self, given: Sequence[tuple[Hashable, int, Unit]]) -> None:
        for feeder, task, unit in given:  # not under the lock: a feeder may be slow to take it
            assert isinstance(feeder, Feeder)
            self._asked[task] = time.monotonic()
            feeder.ask(task, unit)
