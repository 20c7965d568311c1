"""Connections that wait at a relay for those who dial; each that was taken is replaced."""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta

from trainfleet.errors import ConfigError, NotAdmitted, PeerError
from trainfleet.net.admission import Admission
from trainfleet.net.credentials import Credentials
from trainfleet.net.retry import wait_for
from trainfleet.net.room import enter_room, room_of
from trainfleet.net.sockets import wait_readable
from trainfleet.net.token import Token

logger = logging.getLogger(__name__)

_PLACES = 4
_FIRST = timedelta(seconds=30)
"""For the relay to answer at the start."""
_AGAIN = timedelta(minutes=1)
"""For a relay that went away, before the log says so again."""
_TRY_SECONDS = 10.0


class Parked:
    """A few connections of ours that wait at a relay, from its construction to `close`."""

    def __init__(self, via: Token, credentials: Credentials, admission: Admission) -> None:
        """PeerError or NotAdmitted where the first cannot be parked."""
        if credentials.secret is None or credentials.identity is None:
            raise ConfigError(
                "To wait at a relay needs a secret, which names the room, and an identity, which keeps it private.",
                hint="Credentials.make() has both; its token goes to the other side.",
            )
        self._via, self._room, self._admission = via, room_of(credentials.secret), admission
        self._wake_in, self._wake_out = socket.socketpair()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._said = False  # that the relay is not there
        try:
            first = self._park(_FIRST)
        except BaseException:
            self.close()
            raise
        for number in range(_PLACES):
            thread = threading.Thread(
                target=self._keep, args=(first if number == 0 else None,), daemon=True, name=f"parked {number}"
            )
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Park no more; those that wait end. May be called twice; `admission.closing` is set before."""
        with suppress(OSError):
            self._wake_out.send(b"x")
        ends = time.monotonic() + _TRY_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))
        self._wake_in.close()
        self._wake_out.close()

    def _park(self, timeout: timedelta) -> socket.socket:
        def attempt(left: float) -> socket.socket:
            ends = time.monotonic() + min(left, _TRY_SECONDS)
            return enter_room(self._via, self._room, "listens", ends)

        what = f"the relay at {self._via.addresses[0]}"
        return wait_for(what, attempt, timeout=timeout, closing=self._admission.closing)

    def _keep(self, waiting: socket.socket | None) -> None:
        """Keep one connection parked."""
        closing = self._admission.closing
        while not closing.is_set():
            try:
                waiting = waiting or self._park(_AGAIN)
                self._said = False
            except PeerError as exc:  # also NotAdmitted: a relay that starts anew may have another certificate
                with self._lock:
                    new, self._said = not self._said, True
                if new and not closing.is_set():
                    logger.warning("Nobody can connect through the relay. %s", exc)
                if isinstance(exc, NotAdmitted):
                    closing.wait(_TRY_SECONDS)
                continue
            if self._is_called(waiting):
                self._admission.arrived(waiting, self._via.addresses[0])
            else:
                waiting.close()
            waiting = None
        if waiting is not None:
            waiting.close()

    def _is_called(self, waiting: socket.socket) -> bool:
        """Wait until someone speaks; False where the relay has gone, or we close."""
        wait_readable(waiting, self._wake_in)
        if self._admission.closing.is_set():
            return False
        try:
            return bool(waiting.recv(1, socket.MSG_PEEK))
        except OSError:
            return False
