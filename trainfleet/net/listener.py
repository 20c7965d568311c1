"""`Listener`: connections of those who dial, here or through a relay, once they have proved who they are."""

from __future__ import annotations

import errno
import queue
import socket
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from datetime import timedelta

from trainfleet.errors import ConfigError, PeerError
from trainfleet.net.address import Address, is_loopback_number
from trainfleet.net.admission import MOST_PENDING, Admission
from trainfleet.net.credentials import Credentials
from trainfleet.net.parked import Parked
from trainfleet.net.sockets import wait_readable
from trainfleet.net.token import Token

HANDSHAKE = timedelta(seconds=10)


class Listener:
    """Listens from its construction on; no stranger keeps anyone waiting."""

    def __init__(
        self,
        address: Address | str | None,
        *,
        credentials: Credentials | None = None,
        role: str,
        admits: Collection[str] | None = None,
        via: Token | str | None = None,
        handshake: timedelta = HANDSHAKE,
        most_pending: int = MOST_PENDING,
    ) -> None:
        """Port 0 takes a free one, which `address` then says. ConfigError for a port in use, a name that is not of this
        host, or an address that others reach where there are no credentials.

        role: what we are, such as `feeder`. admits: roles that may connect; None: any.
        via: the token of a relay at which to wait too, or only, where `address` is None. PeerError where it does not
        answer, NotAdmitted where it does not take us; later its loss is waited out, and said in the log.
        """
        self._credentials = credentials or Credentials()
        self._via = Token.parse(via) if isinstance(via, str) else via
        self._admission = Admission(
            self._credentials, role=role, admits=admits, handshake=handshake, most_pending=most_pending
        )
        self._door: _Door | None = None
        if address is not None:
            self._door = _Door(Address.parse(address), self._credentials, self._admission)
            self.address = self._door.address
            """Where it listens, with the port that was chosen; the relay's, where it waits only there."""
        elif self._via is not None:
            self.address = self._via.addresses[0]
        else:
            raise ConfigError("A listener needs an address, or the token of a relay.")
        self._parked: Parked | None = None
        if self._via is not None:
            try:
                self._parked = Parked(self._via, self._credentials, self._admission)
            except BaseException:
                self.close()
                raise

    @property
    def refused(self) -> Counter[str]:
        """How many connections were not admitted, by reason."""
        return self._admission.refused

    def accept(self, timeout: timedelta) -> socket.socket:
        """The next connection that was admitted; TimeoutError at the end of `timeout`, PeerError once closed."""
        try:
            sock = self._admission.take(timeout)
        except queue.Empty:
            raise TimeoutError(f"Nobody connected to {self.address} within {timeout.total_seconds():g} s.") from None
        if sock is None:
            raise PeerError(f"The listener at {self.address} is closed.")
        return sock

    def token(self, addresses: Sequence[Address | str] = ()) -> Token:
        """What to print for the other side; `addresses`: as it calls this host. Ours unless given or at a relay.

        Where all interfaces are listened at: the numbers from which packets to other hosts go out.
        """
        if not addresses and self._via is None:
            addresses = self.address.seen_by_others()
        return self._credentials.token(addresses, via=self._via)

    def close(self) -> None:
        """Listen no more; connections that were taken stay, all others end. May be called twice."""
        self._admission.closing.set()
        if self._parked is not None:
            self._parked.close()
        if self._door is not None:
            self._door.close()
        self._admission.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Door:
    """A port of this host, and the thread that accepts there."""

    def __init__(self, address: Address, credentials: Credentials, admission: Admission) -> None:
        self._admission = admission
        self._listening = _listen(address, credentials)
        self.address = Address(address.host, int(self._listening.getsockname()[1]))
        self._wake_in, self._wake_out = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"listen {self.address}")
        self._thread.start()

    def close(self) -> None:
        if self._listening.fileno() == -1:
            return
        self._wake_out.send(b"x")
        self._thread.join()
        for sock in (self._listening, self._wake_in, self._wake_out):
            sock.close()

    def _run(self) -> None:
        while True:
            wait_readable(self._listening, self._wake_in)
            if self._admission.closing.is_set():
                return
            try:
                sock, place = self._listening.accept()
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    # The connection stays in the kernel's queue: to ask again at once would only burn the processor.
                    self._admission.exhausted(exc)
                    self._admission.closing.wait(0.2)
                continue
            self._admission.arrived(sock, Address(str(place[0]).partition("%")[0], place[1]))


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
