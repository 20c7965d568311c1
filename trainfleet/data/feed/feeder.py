"""One feeder, as a trainer sees it: a thread that connects, hears what comes, and connects again."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

from trainfleet.data.feed.session import ALIVE_SECONDS, SILENCE_SECONDS
from trainfleet.data.feed.terms import Offer, Unit
from trainfleet.errors import NotAdmitted, PeerError
from trainfleet.net.channel import Channel, Message

logger = logging.getLogger(__name__)

_FOR_EVER = timedelta(days=365)
_BYE_SECONDS = 1.0


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
        self._connect, self._listening, self._open_channel, self._again = connect, listening, open_channel, again
        self._channel: Channel | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"trainfleet-feeder-{name}", daemon=True)
        self._thread.start()

    def ask(self, task: int, unit: Unit) -> None:
        """Without an answer if the connection is gone: its thread hears that too."""
        self._say("ask", {"task": task, **unit.to_plain()})

    def forget(self) -> None:
        """Nothing that was asked for is wanted any more."""
        self._say("forget", {})

    def say_bye(self) -> None:
        """Have the feeder end the connection; what it was about to send is read until then, and not used."""
        self._closing.set()
        self._say("bye", {})

    def close(self) -> None:
        """End the connection, whether the feeder does or not."""
        self.say_bye()
        self._thread.join(_BYE_SECONDS)
        channel = self._channel  # its thread lets go of it when the connection ends
        if channel is not None:
            channel.close()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _say(self, kind: str, head: dict[str, Any]) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            channel.send(kind, head)
        except PeerError as exc:
            logger.debug("%s", exc)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                sock = self._connect(_FOR_EVER, self._closing)
            except PeerError as exc:
                if not self._closing.is_set():
                    self._listening.given_up(self, exc)
                return
            except Exception as exc:
                self._listening.given_up(self, exc)
                return
            try:
                self._attend(sock)
            except Exception as exc:  # the same would come again
                self._listening.given_up(self, exc)
                return
            if not self._again:
                return
            self._closing.wait(0.1)

    def _attend(self, sock: socket.socket) -> None:
        """Until the connection ends, however it does."""
        stop = threading.Event()
        try:
            with self._open_channel(sock) as channel:
                self._channel = channel
                if self._closing.is_set():  # who closes us closes the channel that it sees
                    return
                told = _told(channel.recv(SILENCE_SECONDS))
                self._listening.joined(self, told)
                threading.Thread(target=self._say_alive, args=(stop,), name="trainfleet-alive", daemon=True).start()
                self._listen(channel)
        except NotAdmitted:
            raise
        except (PeerError, TimeoutError) as exc:
            error = exc if isinstance(exc, PeerError) else PeerError(f"{self.name} said nothing: {exc}")
            if not self._closing.is_set():
                self._listening.left(self, error)
        finally:
            stop.set()
            self._channel = None

    def _listen(self, channel: Channel) -> None:
        while True:
            before = channel.counters.bytes_received
            message = channel.recv(SILENCE_SECONDS)
            if message.kind in ("made", "failed"):
                self._listening.made(self, message, channel.counters.bytes_received - before)
            elif message.kind == "alive":
                self._listening.alive(self, message.head.get("progress"))
            else:
                raise PeerError(f"{self.name} said {message.kind[:40]!r}, which feeders do not say.")

    def _say_alive(self, stop: threading.Event) -> None:
        while not stop.wait(ALIVE_SECONDS):
            self._say("alive", {})


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
