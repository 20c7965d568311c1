"""`Line`: a thread that connects to one peer, hears what comes, says that we are alive, and connects again."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

from trainfleet.errors import NotAdmitted, PeerError
from trainfleet.net.channel import Channel, Message
from trainfleet.net.retry import pauses

logger = logging.getLogger(__name__)

ALIVE_SECONDS = 2.0
"""Whoever has nothing to say for so long says that it is alive."""
SILENCE_SECONDS = 10.0
"""Whoever said nothing for so long is taken for gone."""
_FOR_EVER = timedelta(days=365)
_BYE_SECONDS = 1.0


class Attending(Protocol):
    """Whoever has a line. Called on its thread; an exception other than PeerError gives the line up."""

    def joined(self, message: Message) -> None:
        """The peer's first words. PeerError ends the connection; NotAdmitted, and it is not made again."""

    def heard(self, message: Message, num_bytes: int) -> None:
        """Any later words. PeerError ends the connection."""

    def left(self, reason: PeerError) -> None:
        """The connection ended by itself; it is made again."""

    def given_up(self, reason: Exception) -> None:
        """It will not be made again."""


class Line:
    """From `start` on, until `close`, or until there is no sense in trying again.

    connect(timeout, closing): a connected socket, or PeerError. `again=False`: it connects once.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[timedelta, threading.Event], socket.socket],
        attending: Attending,
        open_channel: Callable[[socket.socket], Channel],
        *,
        again: bool = True,
    ) -> None:
        self.name = name
        self._connect, self._attending, self._open_channel, self._again = connect, attending, open_channel, again
        self._channel: Channel | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"trainfleet-line-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def say(self, kind: str, head: dict[str, Any] | None = None, body: Any = None) -> None:
        """Without an answer if the connection is gone: its thread hears that too. DataError for what cannot travel."""
        channel = self._channel
        if channel is None:
            return
        try:
            channel.send(kind, head, body)
        except PeerError as exc:
            logger.debug("%s", exc)

    def stop(self) -> None:
        """Do not connect again; an end of the connection is no loss from now on."""
        self._closing.set()

    def say_bye(self) -> None:
        """Have the peer end the connection; what it was about to send is read until then, and not used."""
        self.stop()
        self.say("bye")

    def cut(self) -> None:
        """End the connection, a moment after the peer was told to and did not."""
        self._thread.join(_BYE_SECONDS)
        channel = self._channel  # its thread lets go of it when the connection ends
        if channel is not None:
            channel.close()

    def close(self) -> None:
        """End the connection, whether the peer does or not."""
        self.say_bye()
        self.cut()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        again = pauses()
        while not self._closing.is_set():
            try:
                sock = self._connect(_FOR_EVER, self._closing)
            except PeerError as exc:
                if not self._closing.is_set():
                    self._attending.given_up(exc)
                return
            except Exception as exc:
                self._attending.given_up(exc)
                return
            try:
                was_there = self._attend(sock)
            except Exception as exc:  # the same would come again
                self._attending.given_up(exc)
                return
            if not self._again:
                return
            if was_there:
                again = pauses()
            self._closing.wait(next(again))

    def _attend(self, sock: socket.socket) -> bool:
        """Until the connection ends, however it does; whether the peer had joined."""
        stop, was_there = threading.Event(), False
        try:
            with self._open_channel(sock) as channel:
                self._channel = channel
                if self._closing.is_set():  # who closes us closes the channel that it sees
                    return False
                self._attending.joined(channel.recv(SILENCE_SECONDS))
                was_there = True
                threading.Thread(target=self._say_alive, args=(stop,), name="trainfleet-alive", daemon=True).start()
                while True:
                    before = channel.counters.bytes_received
                    message = channel.recv(SILENCE_SECONDS)
                    self._attending.heard(message, channel.counters.bytes_received - before)
        except NotAdmitted:
            raise
        except (PeerError, TimeoutError) as exc:
            error = exc if isinstance(exc, PeerError) else PeerError(f"{self.name} said nothing: {exc}")
            if not self._closing.is_set():
                self._attending.left(error)
        finally:
            stop.set()
            self._channel = None
        return was_there

    def _say_alive(self, stop: threading.Event) -> None:
        while not stop.wait(ALIVE_SECONDS):
            self.say("alive")
