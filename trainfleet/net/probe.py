"""How far and how wide a connection is: round trips, bytes a second both ways, and the difference of two clocks.

    who asks                          who answers (`answer_probe`)
    TIME, number         ────>
                         <────        number, its clock
    PUT, amount, bytes   ────>
                         <────        how many bytes came in how many seconds
    GET, amount          ────>
                         <────        bytes

Who receives takes the time, from the first bytes to the last, so that neither the round trip nor what lies in the
sender's buffers counts. Amounts double until one takes long enough: a slow link is not filled with more than it takes.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

from trainfleet.errors import PeerError
from trainfleet.net.address import obstacle
from trainfleet.net.sockets import read_exactly, set_remaining

ROLE = "doctor"
"""What who asks says of itself; a listener hands such connections to `answer_probe`."""
MOST_BYTES = 1 << 30
"""Of one probe, both ways together."""
LASTS = timedelta(seconds=60)
_ASK = struct.Struct("!4sBQ")
_ANSWER = struct.Struct("!4sQd")
_MAGIC = b"tfpr"
_TIME, _PUT, _GET = 1, 2, 3
_FIRST_BYTES = 1 << 16
_BLOCK = 1 << 18


def answer_probe(sock: socket.socket, *, lasts: timedelta = LASTS, most_bytes: int = MOST_BYTES) -> None:
    """Answer who connected as a `doctor`, until it has heard enough, and close.

    It ends after `lasts`, and before more than `most_bytes` have been asked for, both ways together; nothing of what
    comes is kept, and nothing that the other side does raises.
    """
    ends, left = time.monotonic() + lasts.total_seconds(), most_bytes
    block = memoryview(os.urandom(_BLOCK))  # a tunnel that compresses shall not look faster than it is
    with suppress(OSError, ValueError), sock:
        while True:
            magic, verb, amount = _ASK.unpack(read_exactly(sock, _ASK.size, ends))
            left -= amount if verb in (_PUT, _GET) else 0
            if magic != _MAGIC or left < 0:
                return
            if verb == _TIME:
                answer = _ANSWER.pack(_MAGIC, amount, time.time())
            elif verb == _PUT:
                answer = _ANSWER.pack(_MAGIC, *_drain(sock, amount, ends))
            elif verb == _GET:
                _pour(sock, amount, ends, block)
                continue
            else:
                return
            set_remaining(sock, ends)
            sock.sendall(answer)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundTrips:
    """Of some small messages, in seconds."""

    median: float
    fastest: float
    slowest: float
    clock_ahead: float
    """By how much the other clock is ahead of ours: from the fastest trip, and so right to half of it."""


class Probe:
    """Asks over `sock`, which `dial` gave with the role `doctor`. PeerError where no answer comes within `timeout`."""

    def __init__(self, sock: socket.socket, address: str, *, timeout: timedelta = timedelta(seconds=30)) -> None:
        self._sock = sock
        self._address = address
        self._ends = time.monotonic() + timeout.total_seconds()

    def round_trips(self, *, count: int = 15, lasts: timedelta = timedelta(seconds=2)) -> RoundTrips:
        """Of at most `count` messages one after the other, fewer where that takes longer than `lasts`."""
        trips: list[tuple[float, float]] = []
        begin = time.monotonic()
        while len(trips) < count and (not trips or time.monotonic() - begin < lasts.total_seconds()):
            with self._words():
                trips.append(self._trip(len(trips)))
        seconds = [trip for trip, _ in trips]
        return RoundTrips(
            median=statistics.median(seconds),
            fastest=min(seconds),
            slowest=max(seconds),
            clock_ahead=min(trips)[1],
        )

    def bytes_per_second_up(self, *, lasts: timedelta = timedelta(seconds=1)) -> float:
        """To the other side."""
        block = memoryview(os.urandom(_BLOCK))

        def put(amount: int) -> tuple[int, float]:
            self._ask(_PUT, amount)
            _pour(self._sock, amount, self._ends, block)
            return self._answer()

        return self._rate(put, lasts.total_seconds())

    def bytes_per_second_down(self, *, lasts: timedelta = timedelta(seconds=1)) -> float:
        """From the other side."""

        def get(amount: int) -> tuple[int, float]:
            self._ask(_GET, amount)
            return _drain(self._sock, amount, self._ends)

        return self._rate(get, lasts.total_seconds())

    def _rate(self, exchange: Callable[[int], tuple[int, float]], lasts: float) -> float:
        """Double the amount until an exchange takes half of the time, or a quarter of what is allowed has gone."""
        amount, total = _FIRST_BYTES, 0
        while True:
            with self._words():
                count, seconds = exchange(amount)
            total += amount
            if seconds >= lasts / 2 or total + 2 * amount > MOST_BYTES // 4:
                return count / seconds if seconds > 0 else math.inf
            amount *= 2

    @contextmanager
    def _words(self) -> Iterator[None]:
        """Whatever is in the way of an exchange, as a sentence."""
        try:
            yield
        except TimeoutError as exc:
            raise PeerError(f"{self._address} has admitted us, but does not answer the probe in time.") from exc
        except (OSError, struct.error) as exc:
            reason = obstacle(exc) if isinstance(exc, OSError) else f"{exc}."
            raise PeerError(
                f"{self._address} has admitted us, but ends the probe: {reason}",
                hint="It may answer no probes, or the link may have been cut just now; try again.",
            ) from exc

    def _trip(self, number: int) -> tuple[float, float]:
        sent, begin = time.time(), time.perf_counter()
        self._ask(_TIME, number)
        answered, clock = self._answer()
        seconds = time.perf_counter() - begin
        if answered != number:
            raise PeerError(f"{self._address} answers another question than was asked.")
        return seconds, clock - (sent + seconds / 2)

    def _ask(self, verb: int, amount: int) -> None:
        set_remaining(self._sock, self._ends)
        self._sock.sendall(_ASK.pack(_MAGIC, verb, amount))

    def _answer(self) -> tuple[int, float]:
        magic, amount, number = _ANSWER.unpack(read_exactly(self._sock, _ANSWER.size, self._ends))
        if magic != _MAGIC or not math.isfinite(number):
            raise PeerError(f"{self._address} answers the probe with something else.")
        return int(amount), float(number)


def _pour(sock: socket.socket, amount: int, ends: float, block: memoryview) -> None:
    while amount:
        set_remaining(sock, ends)
        sock.sendall(block[:amount])
        amount -= min(amount, len(block))


def _drain(sock: socket.socket, amount: int, ends: float) -> tuple[int, float]:
    """Read `amount` bytes: how many came after the first, and in how many seconds."""
    buffer, counted, begin = memoryview(bytearray(_BLOCK)), 0, None
    left = amount
    while left:
        set_remaining(sock, ends)
        got = sock.recv_into(buffer[: min(left, _BLOCK)])
        if not got:
            raise ConnectionResetError("the connection ended early")
        left -= got
        if begin is None:
            begin = time.perf_counter()
        else:
            counted += got
    return counted, time.perf_counter() - begin if begin is not None else 0.0
