"""What grows from step to step: leak suspects, found so that a run without a leak raises none."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from trainfleet.monitor.profiling.holdings import Holding
from trainfleet.monitor.units import readable_bytes

_Value = TypeVar("_Value")

LEAST_STEPS = 4
"""Fewer steps tell a cache that fills from a leak no better than a guess."""
RISING = 0.8
"""Least value of Kendall's tau against the steps for a row of bytes to count as rising: of four steps' six pairs one
may stand still. A cache that fills once and a buffer of two sizes in turn stay below it."""
LEAST_BYTES = 1024
"""A step: less is what Python's own objects cost."""
LEAST_SHARE = 1e-5
"""Of the live bytes, a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """Blocks made at one place of which more live after each step."""

    kind: str
    module: str
    operator: str
    phase: str
    shape: tuple[int, ...] | None
    """Of most of them, where an operator was seen to read them."""
    bytes_per_step: int
    blocks: int
    """How many lived in the end."""

    def __str__(self) -> str:
        of = f" of {self.module}" if self.module else ""
        shape = f", shape {tuple(self.shape)}" if self.shape is not None else ""
        return (
            f"{readable_bytes(self.bytes_per_step)} a step: {self.blocks} {self.kind} made by "
            f"{self.operator or 'no operator'} in {self.phase}{of}{shape}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """Live bytes after each of the steps that were followed."""

    live_bytes: tuple[int, ...] = ()
    bytes_per_step: int = 0
    """The median rise between all pairs of steps (Theil and Sen); 0 where nothing is suspected."""
    suspects: tuple[Suspect, ...] = ()

    def in_words(self) -> Iterator[str]:
        if self.suspects:
            steps = len(self.live_bytes)
            yield f"GROWS by {readable_bytes(self.bytes_per_step)} a step over {steps} steps. What stays alive:"
            yield from (f"  {suspect}" for suspect in self.suspects[:5])


def growth_of(found: Sequence[Holding], ends: Sequence[int], device: str) -> Growth:
    """What lived at `ends`, the ends of steps in nanoseconds since 1970."""
    here = [each for each in found if each.block.device == device]
    live = _live_bytes(here, ends)
    least = max(LEAST_BYTES, LEAST_SHARE * live[-1]) if live else 0.0
    rise = round(slope(live))
    if not is_rising(live) or rise < least:
        return Growth(live_bytes=tuple(live))
    places: dict[tuple[str, str], list[Holding]] = defaultdict(list)
    for each in here:
        if each.block.ranges or each.phase:  # what was there before the first step cannot have become more
            places[each.parts[0][0], each.block.operator].append(each)
    suspects = []
    for (module, operator), group in places.items():
        of_group = _live_bytes(group, ends)
        if is_rising(of_group) and slope(of_group) >= min(least, rise / 10):
            alive = [each for each in group if each.block.freed is None or each.block.freed > ends[-1]]
            suspects.append(
                Suspect(
                    kind=_usual(each.kind for each in alive),
                    module=module,
                    operator=operator,
                    phase=_usual(each.phase for each in alive),
                    shape=_usual(each.block.shape for each in alive),
                    bytes_per_step=round(slope(of_group)),
                    blocks=len(alive),
                )
            )
    suspects.sort(key=lambda suspect: -suspect.bytes_per_step)
    return Growth(live_bytes=tuple(live), bytes_per_step=rise if suspects else 0, suspects=tuple(suspects))


def _usual(values: Iterable[_Value]) -> _Value:
    return Counter(values).most_common(1)[0][0]


def is_rising(values: Sequence[float]) -> bool:
    """Whether nearly every later value is larger than every earlier one."""
    if len(values) < LEAST_STEPS:
        return False
    pairs = list(itertools.combinations(values, 2))
    return sum((after > before) - (after < before) for before, after in pairs) >= RISING * len(pairs)


def slope(values: Sequence[float]) -> float:
    """The median rise a step between all pairs of values; 0 of fewer than two."""
    rises = [(values[j] - values[i]) / (j - i) for i, j in itertools.combinations(range(len(values)), 2)]
    return statistics.median(rises) if rises else 0.0


def _live_bytes(found: Sequence[Holding], ends: Sequence[int]) -> list[int]:
    return [
        sum(e.block.size_bytes for e in found if e.block.made <= end and (e.block.freed is None or e.block.freed > end))
        for end in ends
    ]
