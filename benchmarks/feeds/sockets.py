"""Sockets by hand, plain and with TLS, and ours over them: a feeder's side and a trainer's side of each.

A feeder is asked for `count` payloads and sends them as fast as they are taken; a trainer takes them, and adds up
one number of each page, as somebody who uses them would read them. Each side is alone in its process.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

HOST = "127.0.0.1"
PAGE = 4096
WAIT_SECONDS = 60.0

Payload = NDArray[np.uint8]


class Feeder(Protocol):
    address: Any
    """What the trainer's side needs to find it."""

    def feed(self, payload: Payload, count: int) -> None: ...


class Trainer(Protocol):
    def take(self, size: int, count: int) -> Iterator[Payload]: ...


def pages_of(payload: Payload) -> int:
    """The sum of one byte of each page."""
    return int(payload[::PAGE].sum(dtype=np.int64))


# sockets by hand


class RawFeeder:
    """`sendall` of the array."""

    tls = False

    def __init__(self) -> None:
        self._listener = socket.create_server((HOST, 0))
        self.address: Any = self._listener.getsockname()
        self._sock: Any = None

    def feed(self, payload: Payload, count: int) -> None:
        self._sock = self._sock or self._accepted()
        for _ in range(count):
            self._sock.sendall(payload)

    def _accepted(self) -> socket.socket:
        self._listener.settimeout(WAIT_SECONDS)
        sock, _ = self._listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self.tls:
            return sock
        from trainfleet.net.tls import Identity

        return Identity.make().server_context().wrap_socket(sock, server_side=True)


class SlicedFeeder(RawFeeder):
    """`sendall` of a mebibyte at a time: a plain program that knows what suits the caches and the socket's buffers."""

    def feed(self, payload: Payload, count: int) -> None:
        self._sock = self._sock or self._accepted()
        for _ in range(count):
            for begin in range(0, payload.nbytes, 1 << 20):
                self._sock.sendall(payload[begin : begin + (1 << 20)])


def connected(address: Any, *, tls: bool = False) -> socket.socket:
    sock = socket.create_connection(address)
    if not tls:
        return sock
    from trainfleet.net.tls import pinned_context

    return pinned_context().wrap_socket(sock)


class RawTrainer:
    """`recv_into` one array that is there already, until it is full."""

    tls = False

    def __init__(self, address: Any) -> None:
        self._sock = connected(address, tls=self.tls)
        self._memory = np.empty(0, np.uint8)

    def take(self, size: int, count: int) -> Iterator[Payload]:
        if self._memory.nbytes != size:
            self._memory = np.empty(size, np.uint8)
        for _ in range(count):
            view = self._memory.data
            while view.nbytes:
                view = view[self._sock.recv_into(view, 0, 0 if self.tls else socket.MSG_WAITALL) :]
            yield self._memory


class TlsFeeder(RawFeeder):
    tls = True


class TlsTrainer(RawTrainer):
    tls = True


# ours


class OurFeeder(RawFeeder):
    nearby = False

    def feed(self, payload: Payload, count: int) -> None:
        from trainfleet.net.channel import Channel

        if not isinstance(self._sock, Channel):
            self._sock = Channel(self._accepted(), nearby=self.nearby)
        self._sock.recv(WAIT_SECONDS)
        for number in range(count):
            self._sock.send("batch", {"n": number}, {"x": payload})


class OurTrainer:
    nearby = False
    tls = False

    def __init__(self, address: Any) -> None:
        from trainfleet.net.channel import Channel

        self._channel = Channel(connected(address, tls=self.tls), nearby=self.nearby)

    def take(self, size: int, count: int) -> Iterator[Payload]:
        self._channel.send("go")
        for _ in range(count):
            yield self._channel.recv(WAIT_SECONDS).body["x"]


class OurTlsFeeder(OurFeeder):
    tls = True


class OurTlsTrainer(OurTrainer):
    tls = True


class OurNearbyFeeder(OurFeeder):
    nearby = True


class OurNearbyTrainer(OurTrainer):
    nearby = True
