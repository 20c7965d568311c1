"""Mesh: the ranks of a group on the axes of a Plan, one Group per axis; torch has no part in it."""

from __future__ import annotations

from trainfleet.comm.group import Group
from trainfleet.errors import PlanError
from trainfleet.mesh import Axes
from trainfleet.plan import Plan

_ORDER = ("dp_replicate", "dp_shard", "pp", "tp")
"""In this order: the last one varies fastest, so that those that talk most sit side by side."""
_NOT_HERE = {"precision": "fp32", "offload": "none", "compile": False}


class Mesh(Axes):
    """`mesh["tp"]` is the Group of those that differ from this rank on that axis alone.

    `mesh.data_axes` is the Group of all that see different data; batches are dealt out by its rank and size.
    """

    def __init__(self, group: Group, plan: Plan | None = None) -> None:
        plan = plan or Plan()
        for name, only in _NOT_HERE.items():
            if getattr(plan, name) != only:
                raise PlanError(f"plan.{name} is {getattr(plan, name)!r}, but NumPy models know {only!r} only.")
        self.plan = plan.for_world(group.size)
        self.group = group
        degrees = {name: int(getattr(self.plan, name) or 1) for name in _ORDER}
        place: dict[str, int] = {}
        rest = group.rank
        for name in reversed(_ORDER):
            rest, place[name] = divmod(rest, degrees[name])
        groups = {name: group.split(_colour(place, degrees, {name}), name) for name in _ORDER}
        data_axes = group.split(_colour(place, degrees, {"dp_replicate", "dp_shard"}), "data")
        super().__init__(degrees, groups, rank=group.rank, world_size=group.size, data_axes=data_axes)


def _colour(place: dict[str, int], degrees: dict[str, int], along: set[str]) -> int:
    """The same number for ranks that differ on the axes `along` only."""
    colour = 0
    for name in _ORDER:
        colour = colour * degrees[name] + (0 if name in along else place[name])
    return colour
