"""A meeting point for two sides that nobody can dial: both dial the relay, and it copies bytes that it cannot read."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from trainfleet.errors import ConfigError, PeerError
from trainfleet.net.address import Address
from trainfleet.net.credentials import Credentials
from trainfleet.net.dial import peer_of
from trainfleet.net.hello import read_message, send_message
from trainfleet.net.listener import Listener
from trainfleet.net.room import without_tls
from trainfleet.net.sockets import close_gently
from trainfleet.net.token import Token

logger = logging.getLogger(__name__)

_WORDS_SECONDS = 10.0
_PATIENCE_SECONDS = 2.0
"""For a dialler whose room is empty: a connection that was taken is being replaced."""
_MOST_WORDS = 256
"""Guests who have not been parked or joined yet."""
_SWEEP = timedelta(seconds=1)
_BUFFER_BYTES = 1 << 18
_ROOM = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one relay carries at most."""

    rooms: int = 256
    """In which someone waits at the same time."""
    parked: int = 32
    """Connections that wait in one room."""
    pairs: int = 512
    """Joined connections, over all rooms; each takes two threads."""
    idle: timedelta = timedelta(hours=1)
    """After so long without a byte either way, a pair ends."""
    bytes_per_second: float | None = None
    """Of one pair, each way. None: as fast as it goes."""

    def __post_init__(self) -> None:
        if min(self.rooms, self.parked, self.pairs) < 1 or self.idle <= timedelta(0):
            raise ConfigError("A relay needs room for one pair at least, and a time to be idle.")
        if self.bytes_per_second is not None and self.bytes_per_second <= 0:
            raise ConfigError(f"bytes_per_second is {self.bytes_per_second}; leave it out for no limit.")


class Relay:
    """Runs from its construction to `close`, in threads of its own."""

    def __init__(self, address: Address | str, *, credentials: Credentials, limits: Limits | None = None) -> None:
        """Errors as those of `Listener`. The credentials are the relay's own: they say who may use it, and nothing of
        what the two sides show each other."""
        self._limits = limits or Limits()
        self._lock = threading.Condition()  # notified when someone was parked
        self._rooms: dict[str, deque[socket.socket]] = {}
        self._pairs: set[_Pair] = set()
        self._joined = 0  # pairs, and those that will be one in a moment
        self._threads: set[threading.Thread] = set()
        self._words: set[socket.socket] = set()
        self._closing = threading.Event()
        self._listener = Listener(address, credentials=credentials, role="relay", admits={"guest"})
        self.address = self._listener.address
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"relay {self.address}")
        self._thread.start()

    def token(self, addresses: Sequence[Address | str] = ()) -> Token:
        """What to give to the side that listens, which puts it into its own token."""
        return self._listener.token(addresses)

    def counts(self) -> tuple[int, int]:
        """How many connections wait, and how many pairs are joined."""
        with self._lock:
            return sum(len(parked) for parked in self._rooms.values()), len(self._pairs)

    def close(self) -> None:
        """End all connections. May be called twice."""
        self._closing.set()
        self._listener.close()
        self._thread.join()
        with self._lock:
            self._lock.notify_all()
            waiting = [sock for parked in self._rooms.values() for sock in parked]
            self._rooms.clear()
            pairs, words, threads = list(self._pairs), list(self._words), list(self._threads)
        for sock in waiting:
            sock.close()
        for pair in pairs:
            pair.end()
        for sock in words:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in threads:
            thread.join(_WORDS_SECONDS)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        swept = time.monotonic()
        while not self._closing.is_set():
            try:
                sock = self._listener.accept(_SWEEP)
            except TimeoutError:
                pass
            except PeerError:
                return
            else:
                self._start(sock)
            if time.monotonic() - swept >= _SWEEP.total_seconds():
                self._sweep()
                swept = time.monotonic()

    def _start(self, sock: socket.socket) -> None:
        """A thread for a guest; it stays with its connection to the end, or until that is parked."""
        thread = threading.Thread(
            target=self._welcome, args=(sock,), daemon=True, name=f"guest {peer_of(sock).address}"
        )
        with self._lock:
            full = len(self._words) >= _MOST_WORDS
            if not full:
                self._words.add(sock)
                self._threads.add(thread)
        if full:
            sock.close()
        else:
            thread.start()

    def _sweep(self) -> None:
        """Let go of those who went while they waited."""
        with self._lock:
            for room, parked in list(self._rooms.items()):
                for sock in [sock for sock in parked if not _waits(sock)]:
                    parked.remove(sock)
                    sock.close()
                if not parked:
                    del self._rooms[room]

    def _welcome(self, sock: socket.socket) -> None:
        """Hear which room a guest wants, and park it there, or join it with one who is parked."""
        ends = time.monotonic() + _WORDS_SECONDS
        try:
            wish, _ = read_message(sock, ends, peer_of(sock).address)
            joined = self._join(sock, wish, ends)
        except (OSError, PeerError, ValueError) as exc:
            logger.debug("A guest went before it was joined: %s", exc)
            joined = False
        if not joined:
            close_gently(sock)
        with self._lock:
            self._words.discard(sock)
            self._threads.discard(threading.current_thread())

    def _join(self, sock: socket.socket, wish: dict[str, Any], ends: float) -> bool:
        room, side = wish.get("room"), wish.get("side")
        if not isinstance(room, str) or not _ROOM.match(room) or side not in ("listens", "dials"):
            return False
        if side == "listens":
            return self._park(sock, room, ends)
        other = self._await_parked(room, min(ends, time.monotonic() + _PATIENCE_SECONDS))
        if isinstance(other, str):
            send_message(sock, {"refused": other}, ends)
            return False
        try:
            send_message(sock, {"joined": True}, ends)
            self._copy(sock, _Pair(without_tls(sock, ends), other, self._limits, self._closing))
        except BaseException:
            other.close()  # who parked it sees the end, and parks another
            raise
        finally:
            with self._lock:
                self._joined -= 1
        return True

    def _await_parked(self, room: str, ends: float) -> socket.socket | str:
        """One that waits in the room, counted as joined; or why there is none."""
        with self._lock:
            while self._joined < self._limits.pairs:
                if (found := self._take(room)) is not None:
                    self._joined += 1
                    return found
                if self._closing.is_set() or not self._lock.wait(ends - time.monotonic()):
                    return "room"
            return "busy"

    def _park(self, sock: socket.socket, room: str, ends: float) -> bool:
        with self._lock:
            parked = self._rooms.get(room, ())
            full = len(parked) >= self._limits.parked or (not parked and len(self._rooms) >= self._limits.rooms)
        if full:
            send_message(sock, {"refused": "busy"}, ends)
            return False
        send_message(sock, {"parked": True}, ends)
        plain = without_tls(sock, ends)
        plain.setblocking(False)  # for `_waits`
        with self._lock:
            if not self._closing.is_set():
                self._rooms.setdefault(room, deque()).append(plain)
                self._lock.notify_all()
                return True
        plain.close()
        return True

    def _take(self, room: str) -> socket.socket | None:
        """The one that has waited longest, and is still there."""
        parked = self._rooms.get(room)
        while parked:
            sock = parked.popleft()
            if not parked:
                del self._rooms[room]
            if _waits(sock):
                return sock
            sock.close()
        return None

    def _copy(self, guest: socket.socket, pair: _Pair) -> None:
        """Both ways until both have ended; this thread takes one of them."""
        with self._lock:
            self._words.discard(guest)
            self._pairs.add(pair)
        if self._closing.is_set():
            pair.end()
        back = threading.Thread(target=pair.copy, args=(pair.second, pair.first), daemon=True, name="relay back")
        try:
            back.start()
            pair.copy(pair.first, pair.second)
            back.join()
        finally:
            with self._lock:
                self._pairs.discard(pair)
            pair.first.close()
            pair.second.close()


class _Pair:
    """Two sockets, of which each gets what the other says."""

    def __init__(self, first: socket.socket, second: socket.socket, limits: Limits, closing: threading.Event) -> None:
        self.first, self.second = first, second
        self._idle, self._rate = limits.idle.total_seconds(), limits.bytes_per_second
        self._last = time.monotonic()
        self._closing = closing
        for sock in (first, second):
            sock.settimeout(self._idle)

    def copy(self, source: socket.socket, target: socket.socket) -> None:
        """Until `source` says no more, which `target` is then told; an error ends both ways."""
        buffer = memoryview(bytearray(_BUFFER_BYTES if self._rate is None else min(_BUFFER_BYTES, int(self._rate) + 1)))
        try:
            while True:
                try:
                    count = source.recv_into(buffer)
                except TimeoutError:
                    if time.monotonic() - self._last >= self._idle:
                        raise
                    continue
                if not count:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(buffer[:count])
                self._last = time.monotonic()
                if self._rate is not None:
                    self._closing.wait(count / self._rate)
        except OSError:
            self.end()

    def end(self) -> None:
        """Wake both copies, which then close."""
        for sock in (self.first, self.second):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def _waits(sock: socket.socket) -> bool:
    """Whether a parked connection is open and silent; who has been parked does not speak first."""
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
