"""Two ends on one host find each other and pass payloads through shared memory that has no name.

Each end tells the other, through the connection they have, the abstract unix socket at which it can be met and a
secret. A door that can be reached is on this host (and in this network namespace), and only the peer knows the
secret. Only where both ends see the same two addresses are they connected without anything in between: a proxy, a
relay or an emulated link is not passed by. Over the unix socket go descriptors of memory (memfd), each once,
and the numbers of buffers that are free again; the frames themselves stay on the connection, in their order.

The sender copies a payload into a buffer of its own, and the receiver uses it where it lies: one copy.
Nothing has a name in a file system, so nothing is left after a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import re
import secrets
import select
import socket
import struct
import sys
import threading
import time
import weakref
from array import array
from collections import deque
from typing import Any, Final, NamedTuple

import numpy as np

from trainfleet.errors import PeerError
from trainfleet.net.structure import Bytes, padded

logger = logging.getLogger(__name__)

AVAILABLE: Final = sys.platform.startswith("linux") and hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")
SHARED_FROM: Final = 1 << 16  # below this a copy through the kernel costs no more
FEW: Final = 3  # buffers in turn: one is written, one on its way, one in use; more would fall out of the caches
MAX_BUFFERS: Final = 64
NUMBERS: Final = 1 << 16
BUDGET_BYTES: Final = 1 << 28
"""More than two buffers are made only within this."""
TCP_BYTES_PER_SECOND: Final = 2e9  # what waiting for a free buffer is weighed against
MEET_SECONDS: Final = 5.0

_NAME = re.compile(r"[0-9a-f]{32}")
_WORD = struct.Struct("<cIQ")
_NEW, _FREE, _DROPPED = b"N", b"F", b"D"
_INT: Final = array("i").itemsize
_ROOM: Final = socket.CMSG_LEN(_INT) if hasattr(socket, "CMSG_LEN") else 0
_NOW: Final = int(getattr(socket, "MSG_DONTWAIT", 0)) | int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))


class Lent(NamedTuple):
    """A buffer of ours, written for the peer."""

    number: int
    memory: Bytes


class Door:
    """This end's part of finding out. `words()` go to the peer, and its words into `meet`."""

    def __init__(self, sock: socket.socket) -> None:
        self._name, self._secret = secrets.token_hex(16), secrets.token_hex(16)
        self._seen = [_plain(sock.getsockname()), _plain(sock.getpeername())]
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(_abstract(self._name))
        self._listener.listen(4)
        self._listener.setblocking(False)

    def words(self) -> dict[str, Any]:
        return {"door": self._name, "secret": self._secret, "seen": self._seen}

    def meet(self, theirs: Any, max_bytes: int) -> Nearby | None:
        """The way to the peer's memory, where it is on this host and nothing is in between; else None."""
        try:
            name, secret, seen = theirs["door"], theirs["secret"], theirs["seen"]
            known = bool(_NAME.fullmatch(name) and _NAME.fullmatch(secret)) and seen == self._seen[::-1]
        except (TypeError, KeyError):
            known = False
        if not known or name == self._name:
            return None
        if name > self._name:
            return Nearby(None, self, max_bytes)
        self.close()
        sock = self._called(name, secret)
        return None if sock is None else Nearby(sock, self, max_bytes)

    def answer(self) -> socket.socket | None:
        """The connection of whoever knows the secret, if it has come."""
        while True:
            try:
                guest, _ = self._listener.accept()
            except OSError:
                return None
            guest.settimeout(0.2)
            with contextlib.suppress(OSError):
                if secrets.compare_digest(guest.recv(64), self._secret.encode()):
                    return guest
            guest.close()

    def close(self) -> None:
        self._listener.close()

    def _called(self, name: str, secret: str) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setblocking(False)
        try:
            sock.connect(_abstract(name))
            sock.send(secret.encode())
        except OSError:
            sock.close()
            return None
        return sock


class Nearby:
    """Buffers of both ends. `lend` for one thread that sends, `borrow` for one that receives, `close` for any."""

    def __init__(self, sock: socket.socket | None, door: Door, max_bytes: int) -> None:
        self._sock, self._door, self._max_bytes = sock, door, max_bytes
        self._lock = threading.Lock()
        self._closed = False
        self._lends = True
        self._own: dict[int, Bytes] = {}
        self._free: list[int] = []
        self._next = 0
        self._theirs: dict[int, mmap.mmap] = {}
        self._borrowed: dict[int, tuple[weakref.ref[Any], int]] = {}  # by id of the reference: a buffer of theirs
        self._unsaid: deque[tuple[bytes, int]] = deque()  # filled by finalizers too, whichever thread they run on

    # what we send

    def lend(self, num_bytes: int) -> Lent | None:
        """A buffer of ours, at least that long; None where the connection itself is the better way now."""
        if not self._lends or not self._met(0.0):
            return None
        self._say_again()
        patience = time.monotonic() + num_bytes / TCP_BYTES_PER_SECOND
        while True:
            if not self._free:
                self._hear(until_free=True)
            number = self._fitting(num_bytes)
            if number is None and self._may_grow(num_bytes, time.monotonic() > patience):
                number = self._new(num_bytes)
            if number is not None:
                return Lent(number, self._own[number])
            if self._closed or not self._lends or time.monotonic() > patience:
                return None
            self._wait(patience - time.monotonic())

    def _fitting(self, num_bytes: int) -> int | None:
        with self._lock:
            for number in reversed(self._free):  # the last one that came back is the warmest
                if self._own[number].nbytes >= num_bytes:
                    self._free.remove(number)
                    return number
            too_small, self._free = self._free, []
        for number in too_small:
            del self._own[number]
            self._say(_DROPPED, number)
        return None

    def _may_grow(self, num_bytes: int, waited: bool) -> bool:
        held = sum(memory.nbytes for memory in self._own.values())
        return len(self._own) < 2 or (
            (len(self._own) < FEW or waited) and len(self._own) < MAX_BUFFERS and held + num_bytes <= BUDGET_BYTES
        )

    def _new(self, num_bytes: int) -> int | None:
        size = padded(num_bytes + num_bytes // 8)
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            descriptor = os.memfd_create("trainfleet", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as exc:
            self._lend_no_more(exc)
            return None
        try:
            os.posix_fallocate(descriptor, 0, size)  # memory that is not there is an error now, and no signal later
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            memory = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
            number, self._next = self._next, (self._next + 1) % NUMBERS
            assert self._sock is not None
            socket.send_fds(self._sock, [_WORD.pack(_NEW, number, size)], [descriptor])
        except OSError as exc:
            self._lend_no_more(exc)
            return None
        finally:
            os.close(descriptor)
        self._own[number] = memory
        return number

    def _lend_no_more(self, exc: OSError) -> None:
        logger.debug("payloads for a peer on this host go through the connection: %s", exc)
        self._lends = False

    # what we receive

    def borrow(self, number: int, num_bytes: int) -> Bytes:
        """The peer's bytes, in its buffer, which is told free when the last array in it is gone. Raises PeerError."""
        ends = time.monotonic() + MEET_SECONDS
        while number not in self._theirs:
            if not self._met(MEET_SECONDS) or time.monotonic() > ends:
                raise PeerError(f"A frame lies in the shared buffer {number}, which never came.")
            self._wait(0.1)
            self._hear()
        memory = self._theirs[number]
        if len(memory) < num_bytes:
            raise PeerError(f"A frame of {num_bytes:,} bytes lies in a shared buffer of {len(memory):,}.")
        whole: Any = np.frombuffer(memory, np.uint8)
        reference = weakref.ref(whole, self._give_back)
        self._borrowed[id(reference)] = reference, number
        self._say_again()
        borrowed: Bytes = whole[:num_bytes]
        return borrowed

    def _give_back(self, reference: weakref.ref[Any]) -> None:
        """On whichever thread the last array goes: no lock, no wait."""
        self._say(_FREE, self._borrowed.pop(id(reference))[1])

    def _map(self, number: int, size: int, descriptor: int) -> mmap.mmap:
        """The peer's memory, once it is certain that no page of it can go away: a missing one would be a SIGBUS."""
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError:
            seals = 0
        facts = os.fstat(descriptor)
        if not seals & fcntl.F_SEAL_SHRINK or os.fstatvfs(descriptor).f_bsize != mmap.PAGESIZE:
            raise PeerError("A shared buffer is not sealed against shrinking.")
        if facts.st_size != size or not 0 < size <= self._max_bytes + self._max_bytes // 8 + 2 * mmap.PAGESIZE:
            raise PeerError(f"A shared buffer of {facts.st_size:,} bytes was announced as {size:,}, or is too large.")
        if number in self._theirs or len(self._theirs) >= MAX_BUFFERS:
            raise PeerError(f"The shared buffer {number} came twice, or after too many.")
        return mmap.mmap(descriptor, size)

    # words

    def _met(self, seconds: float) -> bool:
        if self._sock is None and not self._closed:
            ends = time.monotonic() + seconds
            while self._sock is None:
                with self._lock:
                    self._sock = self._sock or self._door.answer()
                if self._sock is None:
                    if time.monotonic() >= ends:
                        return False
                    time.sleep(0.001)
            self._sock.setblocking(False)
            self._door.close()
        return not self._closed

    def _say(self, word: bytes, number: int) -> None:
        try:
            if self._sock is not None and not self._closed:
                self._sock.send(_WORD.pack(word, number, 0))
        except BlockingIOError:
            self._unsaid.append((word, number))
        except OSError:
            self._closed = True

    def _say_again(self) -> None:
        for _ in range(len(self._unsaid)):
            self._say(*self._unsaid.popleft())

    def _wait(self, seconds: float) -> None:
        assert self._sock is not None
        with contextlib.suppress(OSError, ValueError):
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            poll.poll(min(5.0, max(0.1, seconds * 1000)))  # short: the other thread may have heard it

    def _hear(self, *, until_free: bool = False) -> None:
        """Take in every word that has come, or those up to a free buffer. Raises PeerError for what cannot be."""
        assert self._sock is not None
        while not (self._closed or (until_free and self._free)):
            with self._lock:
                try:
                    data, said_beside, _, _ = self._sock.recvmsg(_WORD.size + 1, _ROOM, _NOW)
                except BlockingIOError:
                    return
                except OSError:
                    data, said_beside = b"", []
                descriptors = _descriptors(said_beside) if said_beside else []
                try:
                    self._take_in(data, descriptors)
                finally:
                    for descriptor in descriptors:
                        os.close(descriptor)

    def _take_in(self, data: bytes, descriptors: list[int]) -> None:
        if not data:
            self._closed = True
            return
        if len(data) != _WORD.size:
            raise PeerError("A word about shared memory has the wrong length.")
        word, number, size = _WORD.unpack(data)
        if word == _NEW and len(descriptors) == 1:
            self._theirs[number] = self._map(number, size, descriptors[0])
        elif word == _DROPPED:
            self._theirs.pop(number, None)
        elif word == _FREE and number in self._own and number not in self._free:
            self._free.append(number)
        elif word != _FREE:
            raise PeerError("A word about shared memory that nobody says.")

    def close(self) -> None:
        self._closed = True
        if self._sock is not None:
            self._sock.close()
        self._door.close()
        self._own.clear()
        self._theirs.clear()  # arrays that are in use keep their own hold on the memory


def _descriptors(said_beside: list[tuple[int, int, bytes]]) -> list[int]:
    """Those that came with a word; ours to close."""
    return [
        number
        for level, kind, data in said_beside
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
        for number in array("i", data[: len(data) // _INT * _INT])
    ]


def _abstract(name: str) -> bytes:
    return b"\0trainfleet-" + name.encode()


def _plain(name: Any) -> list[Any]:
    """An address as both ends write it: an IPv4 one may be seen as IPv6."""
    host, port = name[:2]
    return [str(host).removeprefix("::ffff:"), port]
