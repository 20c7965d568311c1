"""Who has which units of work: given to whoever is free, given anew where a peer is gone or late.

What comes of a unit is a pure function of it, so a unit may be with two peers, and whichever answers first is taken.
What has been used is not noted here: that is its owner's place in the stream of units.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Peer = TypeVar("Peer")
Unit = TypeVar("Unit")

LATE = 3.0
"""A unit is late after so many times what one takes at this peer."""
LATE_SECONDS = 0.5
"""And not before this."""
MOST_ROOM = 512


@dataclass
class _Standing:
    room: int
    """Units that it may have at a time."""
    held: dict[int, float] = field(default_factory=dict)  # task: when it was given
    latency: float = 0.0
    """Seconds from giving a unit to having its answer: a moving average, 0 before the first."""
    pace: float = 0.0
    """Seconds between two answers while it has units: a moving average, 0 before the first."""
    last: float = 0.0

    @property
    def wait(self) -> float:
        """When a further unit would be back, from now."""
        return self.pace * (len(self.held) + 1)


class Leases(Generic[Peer, Unit]):
    """Not for several threads: its owner has a lock. Times are seconds of any one clock."""

    def __init__(self) -> None:
        self._peers: dict[Peer, _Standing] = {}
        self._units: dict[int, Unit] = {}  # wanted, and not here
        self._pending: list[int] = []  # a heap of tasks that nobody has
        self.unit_bytes = 0.0
        """Of an answer: a moving average, 0 before the first."""

    def __len__(self) -> int:
        return len(self._units)

    @property
    def peers(self) -> int:
        return len(self._peers)

    @property
    def room(self) -> int:
        """Units that all peers together can have."""
        return sum(peer.room for peer in self._peers.values())

    def join(self, peer: Peer, *, room: int) -> None:
        self._peers[peer] = _Standing(max(1, room))

    def leave(self, peer: Peer) -> int:
        """Take back what it has, for others; how many units that were."""
        gone = self._peers.pop(peer, None)
        back = [task for task in (gone.held if gone else ()) if task in self._units and not self._is_held(task)]
        for task in back:
            heapq.heappush(self._pending, task)
        return len(back)

    def add(self, task: int, unit: Unit) -> None:
        self._units[task] = unit
        heapq.heappush(self._pending, task)

    def give(self, now: float) -> list[tuple[Peer, int, Unit]]:
        """What to ask of whom now: the first units first, each of the peer where it is back first."""
        given: list[tuple[Peer, int, Unit]] = []
        while self._pending:
            free = [
                (peer.wait, len(peer.held), n) for n, peer in enumerate(self._peers.values()) if self._has_room(peer)
            ]
            if not free:
                break
            task = heapq.heappop(self._pending)
            if task not in self._units:
                continue
            name = list(self._peers)[min(free)[2]]
            given.append(self._give(name, task, now))
        return given

    def arrived(self, peer: Peer, task: int, now: float, num_bytes: int = 0, *, idle: bool = False) -> bool:
        """An answer is here; whether anybody wanted it. `idle`: the peer has nothing else to do."""
        ours = self._peers.get(peer)
        if ours is not None and (begun := ours.held.pop(task, None)) is not None:
            ours.latency = _average(ours.latency, now - begun)
            ours.pace = _average(ours.pace, now - max(begun, ours.last))
            ours.last = now
            if idle and (self._pending or len(ours.held) < ours.room):
                ours.room = min(MOST_ROOM, ours.room + max(1, ours.room // 4))
        if task not in self._units:
            return False
        del self._units[task]
        if num_bytes:
            self.unit_bytes = _average(self.unit_bytes, num_bytes)
        return True

    def hasten(self, task: int, now: float) -> list[tuple[Peer, int, Unit]]:
        """Ask another peer too for the unit that is waited for, if it is late and someone else is free."""
        if task not in self._units:
            return []
        held = {name: peer for name, peer in self._peers.items() if task in peer.held}
        others = [name for name, peer in self._peers.items() if name not in held and self._has_room(peer)]
        if len(held) != 1 or not others:
            return []
        ((_, peer),) = held.items()
        usual = max(LATE * max(peer.latency, peer.pace), LATE_SECONDS)
        if now - peer.held[task] < usual:
            return []
        quickest = min(others, key=lambda name: self._peers[name].wait)
        return [self._give(quickest, task, now)]

    def drop(self, tasks: Iterable[int]) -> None:
        """These are wanted no more."""
        for task in tasks:
            self._units.pop(task, None)
            for peer in self._peers.values():
                peer.held.pop(task, None)
        if not self._units:
            self._pending.clear()

    def clear(self) -> None:
        """Nothing is wanted any more."""
        self.drop(list(self._units))

    def _give(self, name: Peer, task: int, now: float) -> tuple[Peer, int, Unit]:
        self._peers[name].held[task] = now
        return name, task, self._units[task]

    def _has_room(self, peer: _Standing) -> bool:
        return len(peer.held) < peer.room

    def _is_held(self, task: int) -> bool:
        return any(task in peer.held for peer in self._peers.values())


def _average(before: float, now: float) -> float:
    return now if before == 0.0 else before + 0.2 * (now - before)
