"""`Reception`: all who come to a service, or whom it calls, each attended on a thread of its own."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

from trainfleet.errors import ConfigError, NotAdmitted, PeerError
from trainfleet.net.address import Address
from trainfleet.net.credentials import Credentials
from trainfleet.net.dial import dial, peer_of
from trainfleet.net.listener import Listener
from trainfleet.net.probe import ROLE, answer_probe
from trainfleet.net.token import Token, is_token
from trainfleet.net.tunnel import refuse_without_program

logger = logging.getLogger(__name__)

_A_WHILE = timedelta(seconds=1)
_AGAIN_SECONDS = 0.2


class Reception:
    """Listens, dials, or waits at a relay, from `open` on; a visit of `trainfleet doctor` is answered here.

    attend   called with a socket of someone admitted; returns when that connection is over, and closes it
    role     what the service is, such as `feeder`
    guest    what those are whom it is for, such as `trainer`
    address  where to listen; None: nowhere
    dials    guests that listen themselves, by address or token, who are called again and again
    via      token of a relay where guests come to

    Raises ConfigError for a port in use, an address of others, and an address off loopback without credentials.
    """

    def __init__(
        self,
        attend: Callable[[socket.socket], None],
        *,
        role: str,
        guest: str,
        address: str | Address | None,
        dials: Sequence[str | Address | Token] = (),
        via: Token | str | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        if address is None and via is None and not dials:
            raise ConfigError(f"A {role} needs an address to listen at, a relay, or {guest}s to connect to.")
        self._attend, self._role, self._guest = attend, role, guest
        self._where, self._via = address, via
        self._dials = [Token.parse(to) if isinstance(to, str) and is_token(to) else to for to in dials]
        self.credentials = credentials or Credentials()
        self.closing = threading.Event()
        """Set by `stop`: who attends, then ends."""
        self.listener: Listener | None = None
        self._probes: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def open(self) -> None:
        """Raises what `Listener` raises, and DependencyError where the way to a guest needs a program."""
        for place in self._dials:
            for address in place.addresses if isinstance(place, Token) else [Address.parse(place)]:
                refuse_without_program(address)
        if self._where is not None or self._via is not None:
            self.listener = Listener(
                self._where,
                credentials=self.credentials,
                role=self._role,
                admits=(self._guest, ROLE),
                via=self._via,
            )
            self._start(self._accept)
        for place in self._dials:
            self._start(self._dial, place)

    @property
    def address(self) -> Address:
        """Where it listens, with the port that was chosen for port 0."""
        return self._listening.address

    def token(self, addresses: Sequence[str | Address] = ()) -> Token:
        """What a guest needs to come in; `addresses`: as it calls this host."""
        return self._listening.token(addresses)

    @property
    def _listening(self) -> Listener:
        if self.listener is None:
            raise ConfigError(f"This {self._role} does not listen: it is not open, or only connects to {self._guest}s.")
        return self.listener

    def stop(self) -> None:
        """Nobody comes in any more, and visits of doctors end; those who are attended stay."""
        self.closing.set()
        with self._lock:
            for probe in self._probes:
                with suppress(OSError):
                    socket.socket.shutdown(probe, socket.SHUT_RDWR)  # below TLS, which its own thread reads
        if self.listener is not None:
            self.listener.close()

    def close(self) -> None:
        """Stop, and wait for those who attend. May be called twice."""
        self.stop()
        for thread in self._threads:
            thread.join(30)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name=f"trainfleet-{self._role}", daemon=True)
        self._threads = [other for other in self._threads if other.is_alive()]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self.closing.is_set():
            try:
                sock = self._listening.accept(_A_WHILE)
            except TimeoutError:
                continue
            except PeerError:
                return  # closed
            self._start(self._answer_probe if peer_of(sock).role == ROLE else self._attend, sock)

    def _answer_probe(self, sock: socket.socket) -> None:
        with self._lock:
            self._probes.add(sock)
        try:
            if not self.closing.is_set():
                answer_probe(sock)
        finally:
            with self._lock:
                self._probes.discard(sock)
            sock.close()

    def _dial(self, place: str | Address | Token) -> None:
        """Be there for a guest that listens: connect, and when it has gone, wait for it again."""
        while not self.closing.is_set():
            try:
                sock = dial(
                    place,
                    credentials=None if isinstance(place, Token) else self.credentials,
                    role=self._role,
                    admits=(self._guest,),
                    timeout=timedelta(days=365),
                    closing=self.closing,
                )
            except NotAdmitted as exc:
                logger.error("%s", exc)
                return
            except PeerError as exc:
                logger.info("%s", exc)
                continue
            self._attend(sock)
            self.closing.wait(_AGAIN_SECONDS)
