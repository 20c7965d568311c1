"""`Listener`: connections of those who dial, once they have proved who they are."""

from __future__ import annotations

import errno
import logging
import queue
import select
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from trainfleet.errors import ConfigError, NotAdmitted, PeerError
from trainfleet.net.address import Address, is_loopback_number
from trainfleet.net.credentials import Credentials
from trainfleet.net.dial import remember
from trainfleet.net.hello import MAGIC, Manners, receive, send_message
from trainfleet.net.sockets import close_gently, set_remaining, tune
from trainfleet.net.tls import refusal

if TYPE_CHECKING:
    from trainfleet.net.token import Token

logger = logging.getLogger(__name__)

HANDSHAKE = timedelta(seconds=10)
_SLOW_SECONDS = 1.0
"""Before a wrong secret is answered."""
_MOST_PENDING = 64
"""First words that go on at once; one more ends the oldest, since honest ones take milliseconds."""
_MOST_READY = 256
"""Admitted connections that nobody has taken."""
_MOST_NAMED = 1024
"""Hosts of which the log has said that they were refused."""
_TLS_HANDSHAKE = 0x16  # the first byte of TLS


class Listener:
    """Listens at once; handshakes run in threads of their own, so that no stranger keeps anyone waiting."""

    def __init__(
        self,
        address: Address | str,
        *,
        credentials: Credentials | None = None,
        role: str,
        admits: Collection[str] | None = None,
        handshake: timedelta = HANDSHAKE,
        most_pending: int = _MOST_PENDING,
    ) -> None:
        """Port 0 takes a free one, which `address` then says. ConfigError for a port in use, a name that is not of this
        host, or an address that others reach where there are no credentials.

        role: what we are, such as `feeder`. admits: roles that may connect; None: any.
        """
        self._credentials = credentials or Credentials()
        self._role, self._admits = role, admits
        self._handshake, self._most_pending = handshake.total_seconds(), most_pending
        self._context = self._credentials.server_context()
        identity = self._credentials.identity
        self._fingerprint = identity.fingerprint if identity is not None else None
        if self._credentials.certificates is not None:
            self._fingerprint = self._credentials.certificates.fingerprint
        self.refused: Counter[str] = Counter()
        """Connections that were not admitted, by reason."""
        self._named: set[str] = set()
        self._lock = threading.Lock()
        self._pending: dict[int, socket.socket] = {}  # by number of arrival; duplicates, only to break them off
        self._arrivals = 0
        self._threads: set[threading.Thread] = set()
        self._ready: queue.Queue[socket.socket | None] = queue.Queue(_MOST_READY)
        self._closing = threading.Event()
        self._listening = _listen(Address.parse(address), self._credentials)
        self.address = Address(Address.parse(address).host, int(self._listening.getsockname()[1]))
        """Where it listens, with the port that was chosen."""
        self._wake_in, self._wake_out = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"listen {self.address}")
        self._thread.start()

    def accept(self, timeout: timedelta) -> socket.socket:
        """The next connection that was admitted; TimeoutError at the end of `timeout`, PeerError once closed."""
        try:
            sock = self._ready.get(timeout=max(0.0, timeout.total_seconds())) if not self._closing.is_set() else None
        except queue.Empty:
            raise TimeoutError(f"Nobody connected to {self.address} within {timeout.total_seconds():g} s.") from None
        if sock is None:
            with suppress(queue.Full):
                self._ready.put_nowait(None)  # for others who wait
            raise PeerError(f"The listener at {self.address} is closed.")
        return sock

    def token(self, addresses: Sequence[Address | str] = ()) -> Token:
        """What to print for the other side; `addresses`: as it calls this host, with a port of its own or ours."""
        return self._credentials.token(addresses or [self.address])

    def close(self) -> None:
        """Listen no more; connections that were taken stay, all others end. May be called twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake_out.send(b"x")
        self._thread.join()
        self._listening.close()
        with self._lock:
            for pending in self._pending.values():
                _break_off(pending)
            threads = list(self._threads)
        for thread in threads:
            thread.join(self._handshake)
        self._drop_ready()
        self._ready.put_nowait(None)
        self._wake_in.close()
        self._wake_out.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            select.select([self._listening, self._wake_in], [], [])
            if self._closing.is_set():
                return
            try:
                sock, place = self._listening.accept()
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    # The connection stays in the kernel's queue: to ask again at once would only burn the processor.
                    self._refuse("no descriptors", str(self.address), f"{exc.strerror}: raise `ulimit -n`.")
                    self._closing.wait(0.2)
                continue
            self._arrived(sock, Address(str(place[0]).partition("%")[0], place[1]))

    def _arrived(self, sock: socket.socket, peer: Address) -> None:
        """Hand a new connection to a thread; the oldest that has not finished ends if there are too many."""
        with self._lock:
            if len(self._pending) >= self._most_pending:
                _break_off(self._pending.pop(min(self._pending)))
                self.refused["too many"] += 1
            number = self._arrivals = self._arrivals + 1
            try:
                self._pending[number] = sock.dup()
                thread = threading.Thread(
                    target=self._meet, args=(number, sock, peer), daemon=True, name=f"greet {peer}"
                )
                self._threads.add(thread)
                thread.start()
            except (OSError, RuntimeError):  # no descriptor or no thread left
                self.refused["no descriptors"] += 1
                if (double := self._pending.pop(number, None)) is not None:
                    double.close()
                sock.close()

    def _meet(self, number: int, sock: socket.socket, peer: Address) -> None:
        try:
            admitted = self._admit(sock, peer)
        finally:
            with self._lock:
                double = self._pending.pop(number, None)
                self._threads.discard(threading.current_thread())
                if double is not None:
                    double.close()
        if admitted is None:
            return
        if self._closing.is_set() or double is None:
            admitted.close()
            return
        try:
            self._ready.put_nowait(admitted)
        except queue.Full:
            self.refused["not taken"] += 1
            admitted.close()
        else:
            if self._closing.is_set():  # close() may have emptied the queue a moment before
                self._drop_ready()

    def _drop_ready(self) -> None:
        with suppress(queue.Empty):
            while True:
                if (sock := self._ready.get_nowait()) is not None:
                    sock.close()

    def _admit(self, sock: socket.socket, peer: Address) -> socket.socket | None:
        """The connection after TLS and the first words; None, closed and counted, where they failed."""
        ends = time.monotonic() + self._handshake
        try:
            tune(sock)
            self._same_kind(sock, peer, ends)
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                assert isinstance(sock, ssl.SSLSocket)
                set_remaining(sock, ends)
                sock.do_handshake()
            ours = Manners(
                role=self._role,
                admits=self._admits,
                secret=self._credentials.secret,
                fingerprint=self._fingerprint,
                certified=self._credentials.certificates is not None,
                address=str(peer),
            )
            found = receive(sock, ours, ends, slow=lambda: self._closing.wait(_SLOW_SECONDS))
            sock.settimeout(None)
            return remember(sock, found)
        except TimeoutError:
            self._refuse("silence", peer.host, None)
        except NotAdmitted as exc:
            self._refuse("not admitted", peer.host, str(exc))
        except PeerError:
            self._refuse("not trainfleet", peer.host, None)
        except ssl.SSLError as exc:
            refused = refusal(exc, str(peer))
            self._refuse("not admitted" if refused else "broke off", peer.host, str(refused) if refused else None)
        except OSError:
            self._refuse("broke off", peer.host, None)
        except ValueError:  # ssl, of a socket that was broken off under it
            self._refuse("broke off", peer.host, None)
        close_gently(sock)
        return None

    def _same_kind(self, sock: socket.socket, peer: Address, ends: float) -> None:
        """NotAdmitted, and a word to the other side, if one side speaks TLS and the other does not."""
        set_remaining(sock, ends)
        first = sock.recv(1, socket.MSG_PEEK)
        if self._context is not None and first == MAGIC[:1]:
            send_message(sock, {"refused": "tls"}, ends)
            raise NotAdmitted(f"{peer} speaks without TLS, and we want it.")
        if self._context is None and first and first[0] == _TLS_HANDSHAKE:
            send_message(sock, {"refused": "tls"}, ends)  # which its TLS takes for what it is: no TLS
            raise NotAdmitted(f"{peer} speaks TLS, and we listen without.")

    def _refuse(self, reason: str, host: str, sentence: str | None) -> None:
        """Count, and for what a person should know, one line for each host."""
        with self._lock:
            self.refused[reason] += 1
            new = host not in self._named and len(self._named) < _MOST_NAMED
            if sentence is not None and new:
                self._named.add(host)
        if sentence is not None and new:
            logger.warning("%s Further ones from %s are only counted.", sentence, host)
        else:
            logger.debug("A connection from %s was not admitted: %s.", host, reason)


def _break_off(double: socket.socket) -> None:
    """End a connection that another thread is at: its next call fails, and that thread closes it."""
    with suppress(OSError):
        double.shutdown(socket.SHUT_RDWR)
    double.close()


def _listen(address: Address, credentials: Credentials) -> socket.socket:
    family, place = address.resolve()
    credentials.check_listens(address, loopback=is_loopback_number(place[0]))
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and place[0] == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(place)
        sock.listen(128)
        sock.setblocking(False)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {address.port} of this host is in use, so nothing else can listen there.",
                hint="Is it running already? Otherwise choose another port; 0 takes one that is free.",
            ) from exc
        if exc.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"{address.host} is not an address of this host, so nothing can listen there.",
                hint="0.0.0.0 stands for all its interfaces.",
            ) from exc
        if exc.errno == errno.EACCES:
            raise ConfigError(f"Port {address.port} may not be used by this user. Choose one above 1023.") from exc
        raise ConfigError(f"Nothing can listen at {address}: {exc.strerror}.") from exc
    return sock
