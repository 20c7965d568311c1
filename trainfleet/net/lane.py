"""One direction of a connection through an emulated link: when which bytes arrive, and in what shape.

    sender -> [rate of the link, shared] -> [ceiling of one connection] -> delay, jitter, sent again -> receiver

A rate is kept by arithmetic: bytes leave a bottleneck when it is free of those before them, and occupy it for as long
as they are long. That is a token bucket of depth 0. Nothing here knows sockets or clocks; `now` is given, in seconds.
"""

from __future__ import annotations

import math
from collections import deque
from enum import Enum
from random import Random

from trainfleet.net.conditions import SEGMENT_BYTES, Conditions

QUEUE_SECONDS = 0.02
"""What waits before a bottleneck, at most: a router's queue. More would be the sender's to keep."""
SLICE_SECONDS = 0.002
"""Bytes that arrive together were sent within this time; finer would cost more processor than it shows."""
LARGEST_SLICE = 1 << 18
UNLIMITED_BYTES = 4 << 20
"""Under way in one lane that has no rate: about Linux's largest default window."""
LONE_SEGMENT_SECONDS = 0.2  # RFC 8985, section 7.2: the probe of a lone segment allows for a delayed acknowledgement


class End(Enum):
    """What may stand behind the last bytes."""

    CLOSED = "closed"
    RESET = "reset"


class Bottleneck:
    """A rate, in bits a second; None lets everything through at once."""

    def __init__(self, bits_per_second: float | None) -> None:
        self.bytes_per_second = bits_per_second / 8 if bits_per_second else None
        self.free_at = 0.0
        """When the last byte that was let in has left."""

    def pass_through(self, num_bytes: int, now: float) -> float:
        """When the last of them has left."""
        if self.bytes_per_second is None:
            return now
        self.free_at = max(now, self.free_at) + num_bytes / self.bytes_per_second
        return self.free_at

    def open_at(self) -> float:
        """From when on more may be let in."""
        return self.free_at - QUEUE_SECONDS

    def slice_bytes(self) -> int:
        if self.bytes_per_second is None:
            return LARGEST_SLICE
        return min(LARGEST_SLICE, max(SEGMENT_BYTES, int(self.bytes_per_second * SLICE_SECONDS)))


class Lane:
    """Bytes under way, each piece with the time it is due; in order.

    Which bytes are lost or flipped depends on the seed and on their position in the stream, and not on how it was cut
    into pieces or when they were sent: the same bytes meet the same fate in every run.
    """

    def __init__(self, conditions: Conditions, shared: Bottleneck, seed: str) -> None:
        self._jitter, self._losses, self._flips = (Random(f"{seed} {what}") for what in ("jitter", "loss", "flip"))
        self._delay_seconds = conditions.delay.total_seconds()
        self._jitter_seconds = conditions.jitter.total_seconds()
        self._round_trip_seconds = conditions.round_trip.total_seconds()
        self._loss, self._corruption = conditions.loss, conditions.corruption
        self._own = Bottleneck(conditions.ceiling())
        self._shared = shared
        self._under_way: deque[tuple[float, memoryview | End]] = deque()
        self._last_due = 0.0
        self._position = 0  # of the next byte, in the stream
        self._next_loss = (self._gap(self._losses, self._loss) - 1) * SEGMENT_BYTES
        self._next_flip = self._gap(self._flips, self._corruption) - 1
        self.num_bytes = 0
        """Under way now."""
        self.limit_bytes = self._window()
        """No more is taken while so much is under way."""
        self.lost_segments = 0
        self.flipped_bits = 0

    def take(self, piece: bytes, now: float, *, more_follows: bool) -> None:
        """Bytes that the sender has sent; `more_follows`: there seems to be more behind them."""
        start, self._position = self._position, self._position + len(piece)
        if self._next_flip < self._position:
            piece = self._flipped(piece, start)
        due = self._own.pass_through(len(piece), self._shared.pass_through(len(piece), now)) + self._delay_seconds
        if self._jitter_seconds:
            due += self._jitter.random() * self._jitter_seconds
        due += self._retransmission(len(piece), more_follows=more_follows)
        self._put(due, memoryview(piece))
        self.num_bytes += len(piece)

    def end(self, how: End, now: float) -> None:
        """Nothing more comes; the other side hears of it behind the last bytes."""
        self._put(now + self._delay_seconds, how)

    def next_due(self) -> float | None:
        """When the first piece under way arrives."""
        return self._under_way[0][0] if self._under_way else None

    def first(self) -> memoryview | End:
        return self._under_way[0][1]

    def arrived(self, num_bytes: int) -> None:
        """So many bytes of the first piece were taken by the receiver; 0 for an end."""
        due, piece = self._under_way.popleft()
        self.num_bytes -= num_bytes
        if isinstance(piece, memoryview) and num_bytes < len(piece):
            self._under_way.appendleft((due, piece[num_bytes:]))

    def forget(self) -> int:
        """Drop all that is under way; how many bytes that was."""
        dropped, self.num_bytes = self.num_bytes, 0
        self._under_way.clear()
        return dropped

    def has_room(self) -> bool:
        return self.num_bytes < self.limit_bytes

    def slice_bytes(self) -> int:
        return min(self._shared.slice_bytes(), self._own.slice_bytes())

    def _put(self, due: float, piece: memoryview | End) -> None:
        # In order, whatever jitter says; behind a lost segment everything waits for it.
        self._last_due = max(due, self._last_due)
        self._under_way.append((self._last_due, piece))

    def _window(self) -> int:
        rates = [b.bytes_per_second for b in (self._own, self._shared) if b.bytes_per_second is not None]
        if not rates:
            return UNLIMITED_BYTES
        seconds = self._round_trip_seconds + 2 * QUEUE_SECONDS  # what a lost segment holds up must have room, too
        return int(min(rates) * seconds) + (1 << 14)

    def _retransmission(self, num_bytes: int, *, more_follows: bool) -> float:
        """Seconds by which a lost segment among the last `num_bytes` holds them up."""
        lost = 0
        while self._next_loss < self._position:
            lost += 1
            self._next_loss += self._gap(self._losses, self._loss) * SEGMENT_BYTES
        self.lost_segments += lost
        if not lost:
            return 0.0
        if more_follows or num_bytes > SEGMENT_BYTES:
            return self._round_trip_seconds  # what comes behind tells the sender at once (RFC 5681, section 3.2)
        # Nothing behind it tells: a probe goes out after two round trips (RFC 8985, section 7).
        return 3 * self._round_trip_seconds + LONE_SEGMENT_SECONDS

    def _flipped(self, piece: bytes, start: int) -> bytes:
        changed = bytearray(piece)
        while self._next_flip < self._position:
            changed[int(self._next_flip) - start] ^= 1 << self._flips.randrange(8)
            self.flipped_bits += 1
            self._next_flip += self._gap(self._flips, self._corruption)
        return bytes(changed)

    @staticmethod
    def _gap(random: Random, probability: float) -> float:
        """How many go by until one is hit: geometric, at least 1 from hit to hit."""
        if not probability:
            return math.inf
        return 1.0 + math.floor(math.log(1.0 - random.random()) / math.log1p(-probability))
