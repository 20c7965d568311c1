"""One connection through an emulated link: a socket at each end, and a lane each way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from trainfleet.net.conditions import Conditions
from trainfleet.net.lane import Bottleneck, Lane
from trainfleet.net.loop import Door


@dataclass(kw_only=True, slots=True)
class Counters:
    """What an emulated link has seen so far."""

    connections: int = 0
    open_connections: int = 0
    refused: int = 0
    """Connections whose target did not answer; they were reset."""
    reset: int = 0
    """Connections that were reset: by the link, or by one end."""
    bytes_up: int = 0
    """Delivered to the target."""
    bytes_down: int = 0
    swallowed_bytes: int = 0
    """Lost in a half-open link."""
    lost_segments: int = 0
    """Came a round trip late, as if sent again."""
    flipped_bits: int = 0
    faults: int = 0
    most_bytes_under_way: int = 0
    """In one lane."""

    def __str__(self) -> str:
        counted = f"{self.connections:,} connection{'s' * (self.connections != 1)}"
        others = {
            "refused by the target": self.refused,
            "reset": self.reset,
            "bytes swallowed": self.swallowed_bytes,
            "segments late": self.lost_segments,
            "bits flipped": self.flipped_bits,
        }
        said = [counted, f"{self.bytes_up:,} bytes up", f"{self.bytes_down:,} bytes down"]
        return ", ".join([*said, *(f"{count:,} {what}" for what, count in others.items() if count)])


class Turnstile:
    """The rate of one direction of a link, and who waits to send: one slice each, in turn."""

    def __init__(self, bits_per_second: float | None) -> None:
        self.bottleneck = Bottleneck(bits_per_second)
        self.waiting: deque[Flow] = deque()
        self.alarm_is_set = False

    @property
    def limits(self) -> bool:
        return self.bottleneck.bytes_per_second is not None


@dataclass(kw_only=True, slots=True, eq=False)
class Flow:
    """One direction of a crossing."""

    crossing: Crossing
    source: Door
    sink: Door
    lane: Lane
    turnstile: Turnstile
    goes_up: bool
    waits: bool = False
    """In the turnstile's queue."""
    is_full: bool = False
    """The lane was, when last looked at."""
    ended: bool = False
    """The source has said its last."""
    finished: bool = False
    """The sink has heard it."""
    blocked: bool = False
    """The sink takes no more for now."""
    alarm_is_set: bool = False


@dataclass(kw_only=True, slots=True, eq=False)
class Crossing:
    """A connection from who dialled to the target."""

    number: int
    client: Door
    target: Door | None = None
    flows: list[Flow] = field(default_factory=list)
    is_open: bool = True
    has_lost_bytes: bool = False
    """Its streams have a hole: whoever sends next is answered by a reset, as by a NAT that has forgotten it."""

    def join(self, target: Door, conditions: Conditions, turnstiles: tuple[Turnstile, Turnstile], seed: int) -> None:
        """Both ends are there: a lane each way, whose fate depends on seed, number and direction."""
        self.target = target
        for goes_up, turnstile in zip((True, False), turnstiles, strict=True):
            source, sink = (self.client, target) if goes_up else (target, self.client)
            lane = Lane(conditions, turnstile.bottleneck, f"{seed} {self.number} {'up' if goes_up else 'down'}")
            flow = Flow(crossing=self, source=source, sink=sink, lane=lane, turnstile=turnstile, goes_up=goes_up)
            self.flows.append(flow)

    def doors(self) -> list[Door]:
        return [self.client] if self.target is None else [self.client, self.target]
