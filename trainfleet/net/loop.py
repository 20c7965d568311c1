"""One thread that waits for sockets and for times, to about 0.1 ms, and runs what other threads ask in between."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import math
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

EARLY_SECONDS = 20e-6  # a wait so short costs more than it waits
BUFFER_BYTES = 1 << 18  # of the kernel's, at each socket: what lies there is beyond any limit of ours
_T = TypeVar("_T")


class Door:
    """A non-blocking socket and what is wanted of it; `on_readable` and `on_writable` are called when it is so."""

    def __init__(self, sock: socket.socket, loop: Loop) -> None:
        self.sock = sock
        self._selector = loop.selector
        self.on_readable: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None
        self._asked = 0
        self._registered = 0
        self._held = False
        sock.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)

    def ask(self, *, read: bool | None = None, write: bool | None = None) -> None:
        """What is wanted from now on; None: as before."""
        for flag, wanted in ((selectors.EVENT_READ, read), (selectors.EVENT_WRITE, write)):
            if wanted is not None:
                self._asked = self._asked | flag if wanted else self._asked & ~flag
        self._register()

    def hold(self, *, held: bool) -> None:
        """Nothing is heard while it is held; what is asked counts afterwards."""
        self._held = held
        self._register()

    def _register(self) -> None:
        events = 0 if self._held else self._asked
        if events == self._registered:
            return
        if not self._registered:
            self._selector.register(self.sock, events, self)
        elif events:
            self._selector.modify(self.sock, events, self)
        else:
            self._selector.unregister(self.sock)
        self._registered = events

    def hear(self, events: int) -> None:
        # What one event led to may have taken back what the other was wanted for.
        if events & self._registered & selectors.EVENT_WRITE and self.on_writable:
            self.on_writable()
        if events & self._registered & selectors.EVENT_READ and self.on_readable:
            self.on_readable()

    def close(self, *, reset: bool = False) -> None:
        self.ask(read=False, write=False)
        if reset:  # a close with no time to linger sends RST
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class Loop:
    """Starts with `start`, and ends with `close`, which runs `at_end` in the thread."""

    def __init__(self, name: str, *, at_end: Callable[[], None]) -> None:
        self.selector = selectors.DefaultSelector()
        self._at_end = at_end
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._calls: deque[Callable[[], None]] = deque()
        self._closing = False
        self._bell, bell = socket.socketpair()
        self._bell.setblocking(False)
        self._ear = Door(bell, self)
        self._ear.on_readable = self._wake
        self._ear.ask(read=True)
        self._thread = threading.Thread(target=self._run, daemon=True, name=name)

    def start(self) -> None:
        self._thread.start()

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call it when `time.monotonic()` is `when`."""
        heapq.heappush(self._timers, (when, next(self._order), call))

    def call(self, function: Callable[[], _T]) -> _T:
        """Run it in the thread and wait for what it gives; in this thread, where the other has ended."""
        results: list[_T] = []
        done = threading.Event()

        def run() -> None:
            results.append(function())
            done.set()

        self._calls.append(run)
        self._ring()
        while not done.wait(0.05):
            if not self._thread.is_alive():
                self._run_calls()
        return results[0]

    def close(self) -> None:
        """Returns when the thread has ended."""
        self._closing = True
        self._ring()
        self._thread.join(5)

    def _run(self) -> None:
        try:
            while not self._closing:
                for key, events in self._wait():
                    key.data.hear(events)
                now = time.monotonic() + EARLY_SECONDS
                while self._timers and self._timers[0][0] <= now:
                    heapq.heappop(self._timers)[2]()
        except Exception:
            logger.exception("The thread %s has failed; its sockets are closed.", self._thread.name)
        finally:
            self._at_end()
            self._ear.close()
            self._bell.close()
            self.selector.close()

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        if not self._timers:
            return self.selector.select()
        seconds = self._timers[0][0] - time.monotonic()
        if seconds >= 0.001:  # selectors round up to milliseconds
            return self.selector.select(math.floor(seconds * 1000) / 1000)
        ready = self.selector.select(0)
        if not ready and seconds > 0:
            time.sleep(seconds)
        return ready

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # full: it rings already; closed: `call` sees that the thread has ended
            self._bell.send(b"!")

    def _wake(self) -> None:
        self._ear.sock.recv(4096)
        self._run_calls()

    def _run_calls(self) -> None:
        while self._calls:
            self._calls.popleft()()
