"""One feeder, as a trainer sees it: what it offers, what it is asked, and what it answers."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, Protocol

from trainfleet.data.feed.terms import Offer, Unit
from trainfleet.errors import PeerError
from trainfleet.net.channel import Channel, Message
from trainfleet.net.line import Line


class Told(NamedTuple):
    """What a feeder says of itself when the connection begins."""

    streams: dict[str, Offer]
    host: str
    workers: int


class Listening(Protocol):
    """Whoever has feeders. Called on their threads."""

    def joined(self, feeder: Feeder, told: Told) -> None:
        """Raises NotAdmitted for a feeder that has something else."""

    def left(self, feeder: Feeder, reason: PeerError) -> None: ...

    def made(self, feeder: Feeder, message: Message, num_bytes: int) -> None: ...

    def alive(self, feeder: Feeder, progress: object) -> None:
        """`progress`: another number whenever a sample was made there; whatever the feeder says."""

    def given_up(self, feeder: Feeder, reason: Exception) -> None:
        """It will not be tried again."""


class Feeder:
    """Starts at once and goes on until `close`, or until there is no sense in trying again.

    connect(timeout, closing): a connected socket, or PeerError.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[timedelta, threading.Event], socket.socket],
        listening: Listening,
        open_channel: Callable[[socket.socket], Channel],
        *,
        again: bool = True,
    ) -> None:
        self.name = name
        self._listening = listening
        self._arrived: deque[tuple[int, float]] = deque(maxlen=64)
        self._line = Line(name, connect, self, open_channel, again=again)
        self._line.start()

    def ask(self, task: int, unit: Unit) -> None:
        """Without an answer if the connection is gone: its thread hears that too."""
        arrived = [self._arrived.popleft() for _ in range(len(self._arrived))]
        self._line.say("ask", {"task": task, "arrived": arrived, **unit.to_plain()})

    def arrived(self, task: int, seconds: float) -> None:
        """Have the feeder know, with the next question, how long a batch of it was under way."""
        self._arrived.append((task, seconds))

    def forget(self) -> None:
        """Nothing that was asked for is wanted any more."""
        self._line.say("forget")

    def say_bye(self) -> None:
        """Have the feeder end the connection; what it was about to send is read until then, and not used."""
        self._line.say_bye()

    def close(self) -> None:
        """End the connection, whether the feeder does or not."""
        self._line.close()

    @property
    def is_alive(self) -> bool:
        return self._line.is_alive

    def join(self, seconds: float) -> None:
        self._line.join(seconds)

    # on the line's thread

    def joined(self, message: Message) -> None:
        self._listening.joined(self, _told(message))

    def heard(self, message: Message, num_bytes: int) -> None:
        if message.kind in ("made", "failed"):
            self._listening.made(self, message, num_bytes)
        elif message.kind == "alive":
            self._listening.alive(self, message.head.get("progress"))
        else:
            raise PeerError(f"{self.name} said {message.kind[:40]!r}, which feeders do not say.")

    def left(self, reason: PeerError) -> None:
        self._listening.left(self, reason)

    def given_up(self, reason: Exception) -> None:
        self._listening.given_up(self, reason)


def _told(message: Message) -> Told:
    head = message.head
    streams, host, workers = head.get("streams"), head.get("host"), head.get("workers")
    if (
        message.kind != "offer"
        or not isinstance(streams, dict)
        or not isinstance(host, str)
        or type(workers) is not int
    ):
        raise PeerError("A feeder's first words are not an offer.")
    if not 0 < len(streams) <= 16:
        raise PeerError(f"A feeder offers {len(streams)} streams.")
    return Told({name: Offer.from_plain(offer) for name, offer in streams.items()}, host[:200], workers)
