"""Boxes in an array: where two overlap, and whether some tile the whole."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple


class Region(NamedTuple):
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        return prod(self.shape)

    def overlap(self, other: Region) -> Region | None:
        """What both cover, or None; a point in no dimensions covers itself."""
        starts = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets))
        ends = (min(a + m, b + n) for a, m, b, n in zip(self.offsets, self.shape, other.offsets, other.shape))
        common = Region(starts, tuple(end - start for start, end in zip(starts, ends)))
        return common if all(length > 0 for length in common.shape) else None

    def slices_in(self, outer: Region) -> tuple[slice, ...]:
        """How to cut this region out of an array that covers `outer`."""
        return tuple(
            slice(at - start, at - start + length) for at, length, start in zip(self.offsets, self.shape, outer.offsets)
        )


def first_overlap(regions: Sequence[Region]) -> tuple[int, int] | None:
    """The indices of two regions that overlap, or None. Costs little where they are cut along the first dimension."""
    order = sorted(range(len(regions)), key=lambda i: regions[i].offsets)
    live: list[int] = []  # those that may still overlap what begins later along the first dimension
    for i in order:
        if regions[i].offsets:
            start = regions[i].offsets[0]
            live = [j for j in live if regions[j].offsets[0] + regions[j].shape[0] > start]
        for j in live:
            if regions[j].overlap(regions[i]):
                return j, i
        live.append(i)
    return None


def tiles(regions: Sequence[Region], whole: tuple[int, ...]) -> bool:
    """Whether regions within `whole` that do not overlap leave no hole."""
    return sum(region.volume for region in regions) == prod(whole)
