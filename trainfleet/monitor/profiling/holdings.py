"""What each block of memory was for: its kind and its module, from where it was made and how long it lived."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainfleet.monitor.profiling.allocations import COLLECTIVES, Block, Followed, Range
from trainfleet.monitor.profiling.holders import Held

KINDS = (
    *("parameters", "gathered", "gradients", "optimizer", "buffers", "activations"),
    *("batch", "communication", "temporary", "other"),
)
"""What memory is for, in the order of pictures and tables. `gathered` are parameters of other ranks, held for a
while; `activations` what a forward leaves for its backward, and what a backward computes again; `temporary` what lives
within one phase; `other` what nobody known holds."""

_PLAIN = {
    "data": "batch",
    "transfer": "batch",
    "communication": "communication",
    "optimizer": "temporary",
    "evaluation": "temporary",
    "checkpoint": "other",
    "observers": "other",
}
"""What a block is for that was made in a phase, where no more is known of it. In other phases its life decides."""


@dataclass(frozen=True, slots=True)
class Holding:
    """A block with what it was for."""

    block: Block
    kind: str
    parts: tuple[tuple[str, int], ...]
    """(module, bytes): whose it was, together the whole block."""
    phase: str
    """In which it was made; empty where it was there before."""


@dataclass(frozen=True, slots=True)
class Look:
    """Who held what at one moment."""

    at: int
    """Nanoseconds since 1970."""
    held: Mapping[tuple[str, int], Held]


def holdings(followed: Followed, before: Sequence[Block], looks: Sequence[Look], *, end: int) -> list[Holding]:
    """Every block with its kind. `looks` are in the order of time, the first of them at the beginning.

    `before` are blocks that were there already; what the first look knows not of them is `other`.
    """
    phases = _Phases(followed.phases)
    seen = _Seen(looks)
    found = []
    for block in before:
        held = looks[0].held.get((block.device, block.address))
        found.append(_held(block, held, "") if held else Holding(block, "other", (("", block.size_bytes),), ""))
    for block in followed.blocks:
        phase = phases.at(block.made)
        held = seen.holder_of(block, end)
        if block.is_in("FSDP::all_gather_copy_out"):
            kind = "gathered"
        elif held is not None:
            found.append(_held(block, held, phase))
            continue
        else:
            kind = "communication" if block.is_in(("FSDP::", *COLLECTIVES)) else _by_life(block, phase, phases)
        found.append(Holding(block, kind, ((block.module, block.size_bytes),), phase))
    return found


def _held(block: Block, held: Held, phase: str) -> Holding:
    first, *more = held.parts
    # An allocator of a GPU gives out a little more than was asked for.
    first = first[0], first[1] + block.size_bytes - held.size_bytes
    return Holding(block, held.kind, (first, *more), phase)


def end_unseen(followed: Followed, looks: Sequence[Look]) -> None:
    """Let blocks end that were handed to a collective and whose end was not seen, unless a look finds them later.

    They end where they are last used; those that nothing uses any more where the next collective begins, before which
    such memory is waited for, or where their phase ends.
    """
    phases = _Phases(followed.phases)
    for block in followed.blocks:
        if block.handed_over is None or block.is_end_seen:
            continue
        place = block.device, block.address
        until = block.freed or looks[-1].at
        found = [look.at for look in looks if block.made < look.at <= until and place in look.held]
        if block.freed is None and found and found[-1] == looks[-1].at:
            continue  # it is there
        i = bisect_right(followed.collectives, block.handed_over)
        waited_for = min([phases.end_of(block.handed_over), *followed.collectives[i : i + 1]])
        used = block.used if block.used is not None and block.used > block.handed_over else waited_for
        block.freed = min(max([used, *found]), until)


def _by_life(block: Block, phase: str, phases: _Phases) -> str:
    if phase in _PLAIN:
        return _PLAIN[phase]
    if phase == "backward" or block.is_of_backward:
        if block.module:
            return "activations"  # a forward inside of backward is a recomputation
        end = phases.end_of(block.made)
        return "gradients" if block.freed is None or block.freed > end else "temporary"
    backward = phases.next_backward(block.made)
    if block.freed is not None and (backward is None or block.freed <= backward):
        return "temporary"
    return "activations" if phase == "forward" or block.module else "other"


class _Phases:
    def __init__(self, phases: Sequence[Range]) -> None:
        self._phases = sorted(phases, key=lambda phase: phase.begun)
        self._begins = [phase.begun for phase in self._phases]
        self._backwards = [phase.begun for phase in self._phases if phase.name == "backward"]

    def at(self, time: int) -> str:
        i = bisect_right(self._begins, time) - 1
        return self._phases[i].name if i >= 0 and time < self._phases[i].ended else "other"

    def end_of(self, time: int) -> int:
        """When the phase ends that is there; `time` where none is."""
        i = bisect_right(self._begins, time) - 1
        return max(self._phases[i].ended, time) if i >= 0 else time

    def next_backward(self, time: int) -> int | None:
        i = bisect_left(self._backwards, time)
        return self._backwards[i] if i < len(self._backwards) else None


class _Seen:
    """Looks, to be asked who was found to hold a block while it lived."""

    def __init__(self, looks: Sequence[Look]) -> None:
        self._looks = looks
        self._times = [look.at for look in looks]

    def holder_of(self, block: Block, end: int) -> Held | None:
        last = block.freed if block.freed is not None else end
        for i in range(bisect_left(self._times, block.made), bisect_right(self._times, last)):
            held = self._looks[i].held.get((block.device, block.address))
            if held is not None and held.kind != "other":
                return held
        return None
