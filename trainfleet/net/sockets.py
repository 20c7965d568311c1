"""How our sockets behave: at once, never half dead, and read within a deadline and a length."""

from __future__ import annotations

import selectors
import socket
import time
from contextlib import suppress

DEAD_SECONDS = 60
"""A peer that acknowledges nothing for so long is gone. Also one whose full buffer it does not read for so long:
Linux counts a closed window like silence (tcp_probe_timer)."""
_GENTLE_SECONDS = 1.0
_GENTLE_BYTES = 1 << 16


def tune(sock: socket.socket) -> None:
    """No delay of small messages, and an error after `DEAD_SECONDS` without a word from the other's kernel."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    seconds = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 9, "TCP_USER_TIMEOUT": DEAD_SECONDS * 1000}
    for name, value in seconds.items():  # other systems lack some, and have their own defaults
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def set_remaining(sock: socket.socket, ends: float) -> None:
    """Give the next call on `sock` the time until `ends` of the monotonic clock; TimeoutError if it is over."""
    remaining = ends - time.monotonic()
    if remaining <= 0:
        raise TimeoutError("the time is over")
    sock.settimeout(remaining)


def read_exactly(sock: socket.socket, count: int, ends: float) -> bytes:
    """`count` bytes and none more; ConnectionError at an early end, TimeoutError at `ends`, however they trickle in."""
    read = b""
    while len(read) < count:
        set_remaining(sock, ends)
        chunk = sock.recv(count - len(read))
        if not chunk:
            raise ConnectionResetError("the connection ended early")
        read += chunk
    return read


def wait_readable(*socks: socket.socket) -> None:
    """Return when one of them has bytes or its end to read. One of them is there to end the wait."""
    # poll takes no descriptor of its own: there may be none left.
    with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
        selector.select()


def close_gently(sock: socket.socket) -> None:
    """Close so that our last words arrive: bytes of theirs left unread would make the kernel throw ours away."""
    with suppress(OSError, ValueError):
        socket.socket.shutdown(sock, socket.SHUT_WR)
        ends, count = time.monotonic() + _GENTLE_SECONDS, 0
        while count < _GENTLE_BYTES:
            set_remaining(sock, ends)
            chunk = socket.socket.recv(sock, 4096)
            if not chunk:
                break
            count += len(chunk)
    with suppress(OSError):
        sock.close()
