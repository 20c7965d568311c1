"""Messages over a connected socket: a kind, a small head, and a body of arrays, whole or not at all.

    channel = Channel(sock, limits=Limits(max_bytes=1 << 28), classes=allow(MyBatch))
    channel.send("batch", {"epoch": 0}, {"image": images, "label": labels})     # any thread
    kind, head, body = channel.recv(timeout=30)                                 # one thread at a time
    channel.close()                                                             # any thread; wakes the others

`recv` raises TimeoutError when no message began in time: nothing is lost, and it may be called again. PeerError
means that the connection is of no use any more: the peer went away, stopped in the middle of a frame, or sent what
cannot be; every later call raises the same. DataError means that one message could not be sent, or not be
built here, and the next can.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
from xxhash import xxh3_128

from trainfleet.errors import DataError, PeerError
from trainfleet.net.compression import PREFIX, Compression, available, decode, name_at
from trainfleet.net.flat import Flat
from trainfleet.net.frames import (
    CODED,
    DIGEST,
    DIGEST_BYTES,
    HEADER,
    SHARED,
    Header,
    Incoming,
    Known,
    Limits,
    Outgoing,
    Written,
    pack,
    read_head,
    read_header,
)
from trainfleet.net.memory import Pool
from trainfleet.net.nearby import AVAILABLE, SHARED_FROM, Door, Lent, Nearby
from trainfleet.net.structure import Bytes, Classes, build, padded
from trainfleet.net.wire import Ended, Stalled, open_wire, slices

OWN: Final = "."
"""Kinds that begin so are words between channels."""
HELLO: Final = ".hello"
"""The first message each way: what the channels, not their users, have to know of each other."""


class Message(NamedTuple):
    """What `send` was called with at the other end. The arrays of the body are ours to change."""

    kind: str
    head: dict[str, Any]
    body: Any


@dataclass
class Counters:
    """What went through a channel since it was opened. Times are seconds of wall clock."""

    frames_sent: int = 0
    frames_received: int = 0
    bytes_sent: int = 0
    """Headers and heads included; those through shared memory too."""
    bytes_received: int = 0
    seconds_sending: float = 0.0
    """In calls that hand bytes to the kernel, with the time that they waited for the peer to take some."""
    seconds_receiving: float = 0.0
    """From the first byte of a frame to its last."""
    seconds_waiting: float = 0.0
    """In `recv`, before a frame began."""


class Channel:
    """Takes `sock` over, which is connected and, where that matters, authenticated; `with` closes it.

    `classes`: dataclasses and named tuples that a body may be built of (`allow`). `allocate(num_bytes)`: memory for
    what arrives, such as pinned; anything with a writable buffer. Over plain TCP each payload is under a digest.
    `nearby=False` keeps to the socket also where the peer is on this host (see `net/nearby.py`), `compress=False`
    never makes a payload smaller, though the link be slow (see `net/compression.py`).
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        limits: Limits | None = None,
        classes: Classes | None = None,
        allocate: Callable[[int], Any] | None = None,
        nearby: bool = True,
        compress: bool = True,
    ) -> None:
        self.address = _address(sock)
        self.counters = Counters()
        self._limits, self._classes = limits or Limits(), dict(classes or {})
        self._wire = open_wire(sock, self._limits.stall.total_seconds())
        self._allocate, self._pool = allocate, Pool(allocate)
        self._send_lock, self._recv_lock = threading.Lock(), threading.Lock()
        self._fault: str | None = None
        self._known: Known = {}
        self._written: Written = {}
        self._greeted = False
        self._door = Door(sock) if nearby and AVAILABLE and sock.family in (socket.AF_INET, socket.AF_INET6) else None
        self._nearby: Nearby | None = None
        self._codecs = available() if compress else []
        self._compression = Compression([])
        words = {"nearby": self._door.words() if self._door else None, "codecs": self._codecs}
        try:
            self._send(HELLO, words, None)
        except BaseException:
            self.close()
            raise
        self.counters = Counters()

    def send(self, kind: str, head: dict[str, Any] | None = None, body: Any = None) -> None:
        """Hand a message to the kernel; what lies in `body` may be changed afterwards.

        Waits while the peer does not read, up to `limits.stall` for a slice. Raises DataError, before anything is
        written, for what cannot travel; PeerError when the connection is broken, with the message perhaps sent in part.
        """
        if kind.startswith(OWN):
            raise DataError(f"A message's kind is {kind!r}; those that begin with {OWN!r} are for channels themselves.")
        if not self._greeted:
            self._greet()
        self._send(kind, head, body)

    def _send(self, kind: str, head: dict[str, Any] | None, body: Any) -> None:
        message = pack(kind, head, body, self._limits, self._written)
        with self._send_lock:
            self._check_whole()
            try:
                self._write(message)
            except BaseException as exc:
                self._break(exc, "was sent a frame")

    def recv(self, timeout: float | timedelta) -> Message:
        """The next message. Raises TimeoutError when none began within `timeout` (seconds), PeerError, DataError."""
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        ends = time.monotonic() + seconds
        with self._recv_lock:
            while True:
                self._await_frame(ends, seconds)
                message = self._read_message()
                if message is not None:
                    return message

    def close(self) -> None:
        """End the connection; whoever waits in it gets a PeerError. May be called twice."""
        self._fault = self._fault or "this end closed the connection"
        self._wire.wake()
        # Not before the others have let go: the kernel gives the descriptor's number to the next file.
        for lock in (self._send_lock, self._recv_lock):
            lock.acquire()
        self._wire.close()
        for resource in (self._nearby, self._door):
            if resource is not None:
                resource.close()
        for lock in (self._send_lock, self._recv_lock):
            lock.release()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, message: Outgoing) -> None:
        """header, head, payload by slices, digest; or header and head, and the payload in shared memory."""
        if self._nearby is not None and message.num_bytes >= SHARED_FROM:
            lent = self._nearby.lend(message.num_bytes)
            if lent is not None:
                self._write_shared(message, lent)
                return
        coded = self._compression.made_smaller(message.arrays, message.num_bytes)
        flags = 0 if self._wire.encrypted or not message.num_bytes else DIGEST
        begun, before = self.counters.seconds_sending, self.counters.bytes_sent
        if coded is None:
            self._write_payload([message.header(flags), message.head], slices(message.arrays), flags)
        else:
            start = [message.header(flags | CODED), message.head, coded.prefix]
            self._write_payload(start, slices([coded.data], padding=False), flags)
        self._compression.learn(self.counters.bytes_sent - before, self.counters.seconds_sending - begun)
        self.counters.frames_sent += 1

    def _write_payload(self, start: list[bytes], parts: Iterator[list[memoryview]], flags: int) -> None:
        """The digest is of what goes over the wire, and follows it in the same call as the last slice."""
        digest = xxh3_128() if flags & DIGEST else None
        pieces = [memoryview(piece) for piece in start]
        for part in parts:
            if pieces and not start:
                self._hand_over(pieces)
                pieces = []
            start = []
            if digest is not None:
                for piece in part:
                    digest.update(piece)  # warm for the copy that the kernel makes next
            pieces += part
        if digest is not None:
            pieces.append(memoryview(digest.digest()))
        self._hand_over(pieces)

    def _write_shared(self, message: Outgoing, lent: Lent) -> None:
        begun, place = time.perf_counter(), 0
        for array in message.arrays:
            np.copyto(lent.memory[place : place + array.nbytes], array)
            place += padded(array.nbytes)
        self._wire.send([memoryview(message.header(SHARED, lent.number) + message.head)])
        self.counters.seconds_sending += time.perf_counter() - begun
        self.counters.bytes_sent += HEADER.size + len(message.head) + message.num_bytes
        self.counters.frames_sent += 1

    def _hand_over(self, pieces: list[memoryview]) -> None:
        begun = time.perf_counter()
        self._wire.send(pieces)
        self.counters.seconds_sending += time.perf_counter() - begun
        self.counters.bytes_sent += sum(piece.nbytes for piece in pieces)

    def _await_frame(self, ends: float, seconds: float) -> None:
        self._check_whole()
        begun = time.monotonic()
        came = self._wire.wait(max(0.0, ends - begun))
        self.counters.seconds_waiting += time.monotonic() - begun
        if not came:
            raise TimeoutError(f"No message came from {self.address} within {seconds:g} s.")

    def _greet(self) -> None:
        """Before anything is sent: read the peer's first words if they are here, and nobody else is about to."""
        if self._recv_lock.acquire(blocking=False):
            try:
                if not self._greeted and self._wire.wait(0.0):
                    self._read_message()
            finally:
                self._recv_lock.release()

    def _read_message(self) -> Message | None:
        """None for a word between channels. Raises DataError for what may not be built here."""
        begun = time.perf_counter()
        self._check_whole()
        try:
            incoming, memory, shared = self._read()
            if (incoming.kind == HELLO) is self._greeted or (self._greeted and incoming.kind.startswith(OWN)):
                raise PeerError(f"A frame of the kind {incoming.kind[:20]!r} came out of turn.")
            if not self._greeted:
                self._meet(incoming.head)
                return None
            refused = incoming.refused
            body = None if refused else self._built(incoming.tree, memory, shared)
        except BaseException as exc:
            self._break(exc, "sent a frame")
        self.counters.seconds_receiving += time.perf_counter() - begun
        self.counters.frames_received += 1
        if refused:
            raise refused
        return Message(incoming.kind, incoming.head, body)

    def _built(self, tree: Any, memory: Bytes, shared: bool) -> Any:
        if isinstance(tree, Flat):
            return tree.build(memory)
        return build(tree, memory, classes=self._classes, shared=shared)

    def _meet(self, head: dict[str, Any]) -> None:
        if self._door is not None:
            self._nearby = self._door.meet(head.get("nearby"), self._limits.max_bytes)
            if self._nearby is None:
                self._door.close()
        theirs = head.get("codecs")
        self._compression = Compression([name for name in self._codecs if isinstance(theirs, list) and name in theirs])
        self._greeted = True
        self.counters.bytes_received = 0

    def _read(self) -> tuple[Incoming, Bytes, bool]:
        header = read_header(self._filled(HEADER.size), self._limits)
        head = read_head(header, self._filled(header.head_bytes), self._limits, self._classes, self._known)
        if header.flags & SHARED:
            if self._nearby is None:
                raise PeerError("A frame lies in shared memory, and there is none between us.")
            self.counters.bytes_received += header.num_bytes
            borrowed = self._nearby.borrow(header.buffer, header.num_bytes)
            if self._allocate is None:
                return head, borrowed, True
            memory = self._pool.take(header.num_bytes)
            np.copyto(memory, borrowed)
            return head, memory, False
        if header.num_bytes and not header.flags & DIGEST and not self._wire.encrypted:
            raise PeerError("A frame over plain TCP has no digest.")
        return head, self._read_payload(header), False

    def _filled(self, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        if num_bytes:
            self._wire.fill(memoryview(data))
            self.counters.bytes_received += num_bytes
        return data

    def _read_payload(self, header: Header) -> Bytes:
        if not header.num_bytes:
            return np.empty(0, np.uint8)
        digest = xxh3_128() if header.flags & DIGEST else None
        if header.flags & CODED:
            place, length = PREFIX.unpack(self._filled(PREFIX.size))
            if length >= header.num_bytes or name_at(place) not in self._codecs:
                raise PeerError(f"A frame's payload has {length:,} coded bytes for {header.num_bytes:,}.")
            memory = np.empty(length, np.uint8)
        else:
            memory = self._pool.take(header.num_bytes)
        # With the digest, and the next header if it is here: what would follow that begins at no even place in memory.
        ahead = HEADER.size + (0 if digest is None else DIGEST_BYTES)
        self._wire.fill(memory.data, None if digest is None else digest.update, ahead)
        self.counters.bytes_received += memory.nbytes
        if digest is not None and self._filled(DIGEST_BYTES) != digest.digest():
            raise PeerError("A frame's payload was damaged on the way: its digest differs.")
        if header.flags & CODED:
            coded, memory = memory, self._pool.take(header.num_bytes)
            decode(name_at(place), coded, memory)
        return memory

    def _check_whole(self) -> None:
        if self._fault:
            raise PeerError(f"The connection to {self.address} is closed: {self._fault}.")

    def _break(self, exc: BaseException, deed: str) -> NoReturn:
        """A frame half written or half read leaves the stream out of step, whatever the reason: nothing can follow."""
        if not isinstance(exc, Ended | Stalled | OSError | PeerError):
            self._fault = self._fault or f"a frame was interrupted here by {type(exc).__name__}"
            self._wire.wake()
            raise exc
        if self._fault:  # closed here, meanwhile
            raise PeerError(f"The connection to {self.address} is closed: {self._fault}.") from exc
        if isinstance(exc, PeerError):
            self._fault = f"it sent what cannot be. {exc}"
            self._wire.wake()
            raise type(exc)(f"{self.address} sent what cannot be. {exc}") from exc
        if isinstance(exc, Stalled):
            what = f"{deed} and stopped in the middle of it for {self._limits.stall.total_seconds():g} s"
        elif isinstance(exc, Ended):
            what = "closed the connection"
        else:
            what = f"is gone: {exc.strerror or exc}" if isinstance(exc, OSError) else str(exc)
        self._fault = f"it {what}"
        self._wire.wake()
        raise PeerError(f"{self.address} {what}.") from exc


def _address(sock: socket.socket) -> str:
    try:
        name = sock.getpeername()
    except OSError as exc:
        sock.close()
        raise PeerError(f"A connection ended before it was used: {exc.strerror}.") from exc
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
    return "the other end of a socket pair"
