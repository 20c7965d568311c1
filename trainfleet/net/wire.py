"""Bytes over a connected socket, with a deadline for every slice: plain TCP by blocking calls, TLS by polling.

One thread may read while another writes.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Protocol, TypeAlias

from trainfleet.net.structure import Bytes, padded

SLICE_BYTES: Final = 1 << 20  # stays in a core's own cache between the copy and the digest
LOW_WATER: Final = 1 << 20
"""A reader of a payload is woken for so much at once, or for its end. To be woken for each segment cost both ends
a third more of their processors, and a third of the rate (loopback, 2 cores; benchmarks/feed_throughput.py)."""
LEAST_LOW_WATER: Final = 1 << 16
MAX_PIECES: Final = 512  # of one call; Linux takes 1,024
LEAST_BYTES: Final = 1 << 18  # what a peer has to give or take within the time of a stall
RECORD_BYTES: Final = 1 << 14  # of TLS, at most
JOIN_BYTES: Final = 1 << 14  # pieces below this are joined before they are encrypted
EARLY_BYTES: Final = 1 << 12  # what `wait` may read over TLS: a record, which has a header and its head
MAX_AHEAD: Final = 64
Each: TypeAlias = Callable[[memoryview], object]
_ZEROS: Final = memoryview(bytes(64))


class Stalled(Exception):
    """The peer neither took nor gave a byte for too long."""


class Ended(Exception):
    """The peer closed the connection."""


class Wire(Protocol):
    """A connected socket. `send` and `fill` raise Stalled, Ended or OSError, and the stream is then out of step."""

    encrypted: bool

    def wait(self, seconds: float) -> bool:
        """Whether there is something to read, or an end, within that time."""

    def send(self, pieces: Sequence[memoryview]) -> None: ...

    def fill(self, view: memoryview, each: Each | None = None, ahead: int = 0) -> None:
        """Read until `view` is full; `each` is called with every piece as it has come, in order.

        Up to `ahead` bytes that follow may be read in the same call, for the next one; at most MAX_AHEAD.
        """

    def wake(self) -> None:
        """End both directions, so that whoever waits in another thread returns."""

    def close(self) -> None:
        """Let go of the socket. What was sent and not yet read is still delivered, if the peer sends no more."""


def open_wire(sock: socket.socket, stall_seconds: float) -> Wire:
    """The way to read and write `sock`, which is taken over; half-open connections are noticed within the time."""
    _notice_half_open(sock, stall_seconds)
    if sys.platform.startswith("linux") and not isinstance(sock, ssl.SSLSocket):
        return BlockingWire(sock, stall_seconds)
    return PolledWire(sock, stall_seconds)


def slices(
    arrays: Iterable[Bytes], num_bytes: int = SLICE_BYTES, *, padding: bool = True
) -> Iterator[list[memoryview]]:
    """The arrays, each padded to 64 bytes unless told otherwise, in lists of views; `num_bytes` together, or less."""
    pieces: list[memoryview] = []
    room = num_bytes
    for array in arrays:
        zeros = padded(array.nbytes) - array.nbytes if padding else 0
        for view in (array.data, _ZEROS[:zeros]) if zeros else (array.data,):
            begin, size = 0, view.nbytes
            while begin < size:
                piece = view[begin : begin + room]
                pieces.append(piece)
                begin += piece.nbytes
                room -= piece.nbytes
                if room == 0 or len(pieces) == MAX_PIECES:
                    yield pieces
                    pieces, room = [], num_bytes
    if pieces:
        yield pieces


class BlockingWire:
    """Plain TCP on Linux: the kernel gathers, waits for whole slices (MSG_WAITALL) and keeps the deadline."""

    encrypted = False

    def __init__(self, sock: socket.socket, stall_seconds: float) -> None:
        self._sock, self._stall = sock, stall_seconds
        sock.settimeout(None)
        seconds = struct.pack("ll", int(stall_seconds), max(1, int(stall_seconds % 1 * 1e6)))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._ahead = memoryview(bytearray(MAX_AHEAD))
        self._begin = self._end = 0  # of what has been read ahead

    def wait(self, seconds: float) -> bool:
        return self._end > self._begin or bool(self._readable.poll(seconds * 1000))

    def send(self, pieces: Sequence[memoryview]) -> None:
        left = sum(piece.nbytes for piece in pieces)
        while True:
            began = time.monotonic()
            try:
                sent = self._sock.sendmsg(pieces)
            except BlockingIOError:
                raise Stalled from None
            left -= sent
            if not left:
                return
            self._check_progress(sent, began)
            pieces = _rest(pieces, sent)

    def fill(self, view: memoryview, each: Each | None = None, ahead: int = 0) -> None:
        """What is short by what is here, and a call that waits for all; a payload by waits for the low water."""
        done, size = self._take_ahead(view), view.nbytes
        if done and each is not None:
            each(view[:done])
        low, is_short = 1, size < LEAST_LOW_WATER
        while done < size:
            began = time.monotonic()
            if not is_short:
                if min(LOW_WATER, size - done) != low:
                    low = min(LOW_WATER, size - done)
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low)
                self._readable.poll(self._stall * 1000)
            part = view[done : done + SLICE_BYTES]
            try:
                if is_short or done + part.nbytes < size or not ahead:
                    flags = socket.MSG_WAITALL if is_short else socket.MSG_DONTWAIT
                    got = self._sock.recv_into(part, 0, flags)
                else:
                    got = self._receive_last(part, ahead)
            except BlockingIOError:
                raise Stalled from None
            if not got:
                raise Ended
            if done + got < size:
                self._check_progress(got, began)
            if each is not None:
                each(view[done : done + got])
            done += got
        if low != 1:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def _take_ahead(self, view: memoryview) -> int:
        count = min(self._end - self._begin, view.nbytes)
        if count:
            view[:count] = self._ahead[self._begin : self._begin + count]
            self._begin += count
        return count

    def _receive_last(self, view: memoryview, ahead: int) -> int:
        """What is here, and what lies beyond `view` into the room for that, which is empty."""
        got = self._sock.recvmsg_into([view, self._ahead[:ahead]], 0, socket.MSG_DONTWAIT)[0]
        beyond = max(0, got - view.nbytes)
        self._begin, self._end = 0, beyond
        return got - beyond

    def _check_progress(self, num_bytes: int, began: float) -> None:
        """The kernel gave up waiting within a call: a link may be slow, a trickle is no link."""
        if num_bytes < LEAST_BYTES and time.monotonic() - began >= self._stall * 0.99:
            raise Stalled

    def wake(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        _close(self._sock)


class PolledWire:
    """TLS, and systems other than Linux: calls that never block, one at a time, and waits between them.

    OpenSSL's connections may not be used by two threads at once, and a lock held while one waits to read
    would keep the other from writing.
    """

    def __init__(self, sock: socket.socket, stall_seconds: float) -> None:
        self._sock, self._stall = sock, stall_seconds
        self.encrypted = isinstance(sock, ssl.SSLSocket)
        self._lock = threading.Lock() if self.encrypted else contextlib.nullcontext()
        self._receive: Callable[[int, memoryview], int]
        if isinstance(sock, ssl.SSLSocket):
            self._receive = sock.read  # type: ignore[assignment]
        else:
            self._receive = lambda num_bytes, view: sock.recv_into(view, num_bytes)
        self._early = b""
        self._low_water = 1
        sock.settimeout(0)

    def wait(self, seconds: float) -> bool:
        """By reading: over TLS bytes may come that are not for us, such as tickets, and others may be here already."""
        ends = time.monotonic() + seconds
        while not self._early:
            left, to_write = max(0.0, ends - time.monotonic()), False
            try:
                with self._lock:
                    self._early = self._sock.recv(EARLY_BYTES)
                return True
            except ssl.SSLWantWriteError:
                to_write = True
            except (ssl.SSLWantReadError, BlockingIOError):
                pass
            except OSError:
                return True  # `fill` will say it
            if not _await(self._sock, to_write, left):
                return False
        return True

    def send(self, pieces: Sequence[memoryview]) -> None:
        for joined in _joined(pieces):
            for begin in range(0, joined.nbytes, LEAST_BYTES):
                self._send(joined[begin : begin + LEAST_BYTES])

    def _send(self, view: memoryview) -> None:
        done, size, ends = 0, view.nbytes, time.monotonic() + self._stall
        while done < size:
            try:
                with self._lock:
                    done += self._sock.send(view[done:])
            except ssl.SSLWantReadError:
                self._await(False, ends)
            except (ssl.SSLWantWriteError, BlockingIOError):
                self._await(True, ends)
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                raise Ended from None

    def fill(self, view: memoryview, each: Each | None = None, ahead: int = 0) -> None:
        early = min(len(self._early), view.nbytes)
        view[:early], self._early = self._early[:early], self._early[early:]
        if each is not None:
            each(view[:early])
        for begin in range(early, view.nbytes, LEAST_BYTES):
            part = view[begin : begin + LEAST_BYTES]
            self._fill(part, view.nbytes - begin)
            if each is not None:
                each(part)
        self._set_low_water(1)

    def _fill(self, view: memoryview, to_come: int) -> None:
        done, size, ends = 0, view.nbytes, time.monotonic() + self._stall
        receive = self._receive
        while done < size:
            try:
                with self._lock:
                    while done < size:  # a record of 16 KiB at a time
                        got = receive(size - done, view[done:])
                        done += got
                        if not got:
                            raise Ended
            except ssl.SSLWantWriteError:
                self._await(True, ends)
            except (ssl.SSLWantReadError, BlockingIOError):
                # OpenSSL may hold a record in part, which comes no more.
                self._set_low_water(min(LOW_WATER, to_come - done - 2 * RECORD_BYTES))
                self._await(False, ends)
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                raise Ended from None

    def _set_low_water(self, num_bytes: int) -> None:
        if sys.platform.startswith("linux"):
            num_bytes = num_bytes if num_bytes >= LEAST_LOW_WATER else 1
            if num_bytes != self._low_water:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)
                self._low_water = num_bytes

    def wake(self) -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # below TLS, whose own would drop its state

    def close(self) -> None:
        _close(self._sock)

    def _await(self, to_write: bool, ends: float) -> None:
        if not _await(self._sock, to_write, max(0.0, ends - time.monotonic())):
            raise Stalled


def _await(sock: socket.socket, to_write: bool, seconds: float) -> bool:
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLOUT if to_write else select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    ready = select.select([] if to_write else [sock], [sock] if to_write else [], [], seconds)
    return any(ready)


def _close(sock: socket.socket) -> None:
    """What the peer sent is read and forgotten: else the kernel would reset the connection, and drop our last words."""
    with contextlib.suppress(OSError):
        sock.settimeout(0)
        while socket.socket.recv(sock, SLICE_BYTES):  # below TLS
            pass
    sock.close()


def _rest(pieces: Sequence[memoryview], sent: int) -> Sequence[memoryview]:
    for place, piece in enumerate(pieces):
        if sent < piece.nbytes:
            return [piece[sent:], *pieces[place + 1 :]]
        sent -= piece.nbytes
    return []


def _joined(pieces: Sequence[memoryview]) -> Iterator[memoryview]:
    """The same bytes with neighbours that are small made one: each call would be a record of its own."""
    small: list[memoryview] = []
    for piece in pieces:
        if piece.nbytes < JOIN_BYTES:
            small.append(piece)
            continue
        if small:
            yield memoryview(b"".join(small))
            small = []
        yield piece
    if small:
        yield memoryview(b"".join(small))


def _notice_half_open(sock: socket.socket, seconds: float) -> None:
    """A peer whose host went away without a word is noticed by the kernel, also while nobody sends."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", max(1, int(seconds / 3))),
        ("TCP_KEEPINTVL", max(1, int(seconds / 6))),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", int(seconds * 1000)),
    ):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
