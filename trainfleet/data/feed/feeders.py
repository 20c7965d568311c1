"""All feeders of one rank as a pool: whoever is free makes the next batch, and none is lost with a feeder."""

from __future__ import annotations

import functools
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from trainfleet.data.feed.answer import difference_of, parsed_answer, timed
from trainfleet.data.feed.feeder import Feeder, Told
from trainfleet.data.feed.terms import Offer, Unit
from trainfleet.data.samples import Made
from trainfleet.errors import DataError, NotAdmitted, PeerError
from trainfleet.net.address import Address
from trainfleet.net.channel import Channel, Message
from trainfleet.net.credentials import Credentials
from trainfleet.net.dial import dial, peer_of
from trainfleet.net.entrance import Entrance
from trainfleet.net.frames import Limits
from trainfleet.net.lease import Leases
from trainfleet.net.listener import Listener
from trainfleet.net.token import Token, is_token

logger = logging.getLogger(__name__)

_SAY_AFTER = 5.0
"""Seconds of waiting after which the reason is said, once."""
_LOOK = 0.25
_LEAST_AHEAD = 2


@dataclass(kw_only=True)
class Ways:
    """How feeders are come by: those that are called, and where others may call."""

    feeders: Sequence[str | Address | Token] = ()
    listen: str | Address | None = None
    via: Token | str | None = None
    tunnel: str | None = None
    credentials: Credentials | None = None
    told: Callable[[Address | Token], None] | None = None
    """Called with what feeders have to dial, once it is known and when it changes."""
    classes: dict[str, type] | None = None
    limits: Limits | None = None
    nearby: bool = True

    def channel(self, sock: socket.socket) -> Channel:
        return Channel(sock, limits=self.limits, classes=self.classes, nearby=self.nearby)


class Feeders:
    """Makes units, for any number of streams (lane.py); the numbers of their tasks are drawn from `numbers`.

    Closed when each of those who share it has called `close`.
    """

    def __init__(self, ways: Ways, *, timeout: timedelta, buffer_bytes: int) -> None:
        self.numbers = itertools.count()
        self.lost = 0
        """Connections to feeders that ended by themselves."""
        self.repeated = 0
        """Units that were asked for anew, of another feeder or the same."""
        self.seconds_waited = 0.0
        """The loop's, for batches that were not here yet."""
        self._ways, self._timeout, self._buffer_bytes = ways, timeout.total_seconds(), buffer_bytes
        self._changed = threading.Condition()
        self._leases: Leases[Unit] = Leases()
        self._done: dict[int, Made | Exception] = {}
        self._asked: dict[int, float] = {}  # when somebody was last asked for it
        self._offers: dict[str, Offer] = {}
        self._reasons: dict[str, str] = {}  # by feeder, why it is not here
        self._num_given_up = 0
        self._fatal: Exception | None = None
        self._moved = 0.0  # when anything was last heard that brings a batch nearer
        self._progress: dict[str, object] = {}  # by feeder, what it last said of its own
        self._starved = False  # whether the loop had to wait for its last batch
        self._closing = threading.Event()
        self._feeders: list[Feeder] = []
        self._users = 1
        self._listener: Listener | None = None
        self._entrance: Entrance | None = None
        self._accepting: threading.Thread | None = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if self._ways.listen is not None or (self._ways.via is not None and not self._ways.feeders):
            self._listener = Listener(
                self._ways.listen,
                credentials=self._ways.credentials,
                role="trainer",
                admits=("feeder",),
                via=self._ways.via,
            )
            self._accepting = threading.Thread(target=self._accept, name="trainfleet-feeders", daemon=True)
            self._accepting.start()
            self._tell_feeders()
        for place in self._ways.feeders:
            if isinstance(place, str) and is_token(place):
                place = Token.parse(place)
            # A token is a secret, and is not for the log.
            name = " or ".join(map(str, place.addresses)) or "the relay" if isinstance(place, Token) else str(place)
            self._feeders.append(Feeder(name, functools.partial(self._call, name, place), self, self._ways.channel))

    def _tell_feeders(self) -> None:
        assert self._listener is not None
        ways, listener = self._ways, self._listener
        if ways.tunnel is not None:
            self._entrance = Entrance(
                ways.tunnel, listener.address.port, moved=lambda place: self._told(listener.token([place]))
            )
            self._told(listener.token([self._entrance.address]))
        elif ways.via is None:
            self._told(listener.address)

    def _told(self, place: Address | Token) -> None:
        if self._ways.told is not None:
            self._ways.told(place)

    def _call(
        self, name: str, place: str | Address | Token, timeout: timedelta, closing: threading.Event
    ) -> socket.socket:
        return dial(
            place,
            credentials=self._ways.credentials,
            role="trainer",
            admits=("feeder",),
            timeout=timeout,
            closing=closing,
            told=functools.partial(self._unreached, name),
        )

    def _unreached(self, name: str, reason: PeerError) -> None:
        with self._changed:
            self._reasons[name] = str(reason)

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._closing.is_set():
            try:
                sock = self._listener.accept(timedelta(seconds=1))
            except TimeoutError:
                continue
            except PeerError:
                return
            self._feeders = [feeder for feeder in self._feeders if feeder.is_alive]
            self._feeders.append(
                Feeder(peer_of(sock).address, lambda *_, sock=sock: sock, self, self._ways.channel, again=False)
            )

    def offer(self, stream: str) -> Offer:
        """What the first feeder offers of `stream`; DataError if it has none, PeerError if none is there in time."""
        self._wait(lambda: bool(self._offers), "the first feeder")
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
        return self._listener.address if self._listener is not None else None

    @property
    def connected(self) -> int:
        """Feeders that are here."""
        return self._leases.peers

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
            self._wait(lambda: task in self._done, "a batch", task)
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
        for feeder in list(self._feeders) if idle else ():
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
        self._closing.set()
        if self._listener is not None:
            self._listener.close()
        if self._accepting is not None:
            self._accepting.join(10)
        for feeder in self._feeders:
            feeder.say_bye()
        for feeder in self._feeders:
            feeder.close()
        for feeder in self._feeders:
            feeder.join(10)
        if self._entrance is not None:  # what was said to feeders has gone through it
            self._entrance.close()
        with self._changed:
            self._done.clear()

    # on the feeders' threads

    def joined(self, feeder: Feeder, told: Told) -> None:
        with self._changed:
            self._offers = self._offers or told.streams
            if difference := difference_of(feeder.name, told.streams, self._offers):
                raise NotAdmitted(difference)
            self._reasons.pop(feeder.name, None)
            self._leases.join(feeder, room=2 * max(1, told.workers) + 2)
            self._moved = time.monotonic()
            self._changed.notify_all()
        logger.info("Feeder %s on %s is here, with %d workers.", feeder.name, told.host, told.workers)
        self._hand_out()

    def left(self, feeder: Feeder, reason: PeerError) -> None:
        with self._changed:
            back = self._leases.leave(feeder)
            self._reasons[feeder.name] = str(reason)
            self.lost += 1
            self.repeated += back
            self._changed.notify_all()
        logger.warning("Feeder %s is gone: %s %d batches are asked of others.", feeder.name, reason, back)
        self._hand_out()

    def made(self, feeder: Feeder, message: Message, num_bytes: int) -> None:
        task, made = parsed_answer(message)
        with self._changed:
            self._moved = now = time.monotonic()
            made = timed(made, message, now - self._asked.pop(task, now), num_bytes)
            idle = self._starved and message.head.get("idle") is True
            if self._leases.arrived(feeder, task, now, num_bytes, idle=idle):
                self._done[task] = made
                self._changed.notify_all()
        if isinstance(made, Made) and made.way is not None:
            feeder.arrived(task, round(made.way.transit, 6))
        self._hand_out()

    def alive(self, feeder: Feeder, progress: object) -> None:
        with self._changed:
            if progress != self._progress.get(feeder.name):
                self._progress[feeder.name] = progress
                self._moved = time.monotonic()

    def given_up(self, feeder: Feeder, reason: Exception) -> None:
        with self._changed:
            self._leases.leave(feeder)
            self._reasons[feeder.name] = str(reason)
            # One that is not admitted is no loss while there are others; anything else would come again and again.
            self._num_given_up += 1
            called = len(self._ways.feeders)
            if not isinstance(reason, PeerError) or (self._listener is None and called <= self._num_given_up):
                self._fatal = self._fatal or reason
            self._changed.notify_all()
        logger.error("Feeder %s is given up: %s", feeder.name, reason)
        self._hand_out()

    # between them

    def _hand_out(self) -> None:
        with self._changed:
            given = self._leases.give(time.monotonic())
        self._ask(given)

    def _ask(self, given: Sequence[tuple[Hashable, int, Unit]]) -> None:
        for feeder, task, unit in given:  # not under the lock: a feeder may be slow to take it
            assert isinstance(feeder, Feeder)
            self._asked[task] = time.monotonic()
            feeder.ask(task, unit)

    def _wait(self, met: Callable[[], bool], what: str, task: int | None = None) -> None:
        since = time.monotonic()
        said = False
        while True:
            with self._changed:
                if not met() and self._fatal is None:
                    self._changed.wait(_LOOK)
                if met():
                    break
                if self._fatal is not None:
                    raise self._fatal
                now = time.monotonic()
                last = max(since, self._moved)
                given = self._leases.hasten(task, now) if task is not None else []
                self.repeated += len(given)
                here, why = self._leases.peers, "; ".join(f"{name}: {text}" for name, text in self._reasons.items())
            self._ask(given)
            if now - last > self._timeout:
                stuck = f"the {here} that are here made no progress" if here else "no feeder was there"
                raise PeerError(
                    f"Waited {self._timeout:g} s for {what}, and {stuck}. {why or 'None answered.'}",
                    hint="Start one with `trainfleet feed`, or look at its address with `trainfleet doctor HOST:PORT`.",
                )
            if not said and now - since > _SAY_AFTER:
                said = True
                logger.warning("Waiting for %s, with %d feeders here. %s", what, here, why)
