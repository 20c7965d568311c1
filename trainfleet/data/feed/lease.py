"""Who has which units: given to whoever is free, given anew where a feeder is gone or late.

Batches are pure functions of their units, so a unit may be with two feeders, and whichever comes first is taken. What
has been used is not noted here: that is the stream's place, which the model's checkpoint has.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field

from trainfleet.data.sampler import Span

LATE = 3.0
"""A unit is late after so many times what one takes at this feeder."""
LATE_SECONDS = 0.5
"""And not before this."""
MOST_ROOM = 512


@dataclass
class _Feeder:
    room: int
    """Units that it may have at a time."""
    held: dict[int, float] = field(default_factory=dict)  # task: when it was given
    latency: float = 0.0
    """Seconds from giving a unit to having its batch: a moving average, 0 before the first."""
    pace: float = 0.0
    """Seconds between two batches while it has units: a moving average, 0 before the first."""
    last: float = 0.0

    @property
    def wait(self) -> float:
        """When a further unit would be back, from now."""
        return self.pace * (len(self.held) + 1)


class Leases:
    """Not for several threads: its owner has a lock. Times are seconds of any one clock."""

    def __init__(self) -> None:
        self._feeders: dict[Hashable, _Feeder] = {}
        self._units: dict[int, Span] = {}  # wanted, and not here
        self._pending: list[int] = []  # a heap of tasks that nobody has
        self.unit_bytes = 0.0
        """Of a batch: a moving average, 0 before the first."""

    def __len__(self) -> int:
        return len(self._units)

    @property
    def feeders(self) -> int:
        return len(self._feeders)

    @property
    def room(self) -> int:
        """Units that all feeders together can have."""
        return sum(feeder.room for feeder in self._feeders.values())

    def join(self, feeder: Hashable, *, room: int) -> None:
        self._feeders[feeder] = _Feeder(max(1, room))

    def leave(self, feeder: Hashable) -> int:
        """Take back what it has, for others; how many units that were."""
        gone = self._feeders.pop(feeder, None)
        back = [task for task in (gone.held if gone else ()) if task in self._units and not self._is_held(task)]
        for task in back:
            heapq.heappush(self._pending, task)
        return len(back)

    def add(self, task: int, unit: Span) -> None:
        self._units[task] = unit
        heapq.heappush(self._pending, task)

    def give(self, now: float) -> list[tuple[Hashable, int, Span]]:
        """What to ask of whom now: the first units first, each of the feeder where it is back first."""
        given: list[tuple[Hashable, int, Span]] = []
        while self._pending:
            free = [
                (feeder.wait, len(feeder.held), n)
                for n, feeder in enumerate(self._feeders.values())
                if self._has_room(feeder)
            ]
            if not free:
                break
            task = heapq.heappop(self._pending)
            if task not in self._units:
                continue
            name = list(self._feeders)[min(free)[2]]
            given.append(self._give(name, task, now))
        return given

    def arrived(self, feeder: Hashable, task: int, now: float, num_bytes: int = 0, *, idle: bool = False) -> bool:
        """A batch is here; whether anybody wanted it. `idle`: the feeder has nothing else to do."""
        ours = self._feeders.get(feeder)
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

    def hasten(self, task: int, now: float) -> list[tuple[Hashable, int, Span]]:
        """Ask another feeder too for the unit that the loop waits for, if it is late and someone else is free."""
        if task not in self._units:
            return []
        held = {name: feeder for name, feeder in self._feeders.items() if task in feeder.held}
        others = [name for name, feeder in self._feeders.items() if name not in held and self._has_room(feeder)]
        if len(held) != 1 or not others:
            return []
        ((_, feeder),) = held.items()
        usual = max(LATE * max(feeder.latency, feeder.pace), LATE_SECONDS)
        if now - feeder.held[task] < usual:
            return []
        quickest = min(others, key=lambda name: self._feeders[name].wait)
        return [self._give(quickest, task, now)]

    def clear(self) -> None:
        """Nothing is wanted any more."""
        self._units.clear()
        self._pending.clear()
        for feeder in self._feeders.values():
            feeder.held.clear()

    def _give(self, name: Hashable, task: int, now: float) -> tuple[Hashable, int, Span]:
        self._feeders[name].held[task] = now
        return name, task, self._units[task]

    def _has_room(self, feeder: _Feeder) -> bool:
        return len(feeder.held) < feeder.room

    def _is_held(self, task: int) -> bool:
        return any(task in feeder.held for feeder in self._feeders.values())


def _average(before: float, now: float) -> float:
    return now if before == 0.0 else before + 0.2 * (now - before)
