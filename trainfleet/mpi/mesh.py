"""Mesh: the ranks of a group on the axes of a Plan, one Group per axis; torch has no part in it."""

from __future__ import annotations

from trainfleet.comm.group import Group
from trainfleet.errors import PlanError
from trainfleet.plan import Plan

AXES = ("dp_replicate", "dp_shard", "pp", "tp")
"""In this order: the last one varies fastest, so that those that talk most sit side by side."""
_NOT_HERE = {"precision": "fp32", "offload": "none", "compile": False}


class Mesh:
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
        self.plan_axes = {name: int(getattr(self.plan, name) or 1) for name in AXES}
        """Degree of each axis by name, in order."""
        place: dict[str, int] = {}
        rest = group.rank
        for name in reversed(AXES):
            rest, place[name] = divmod(rest, self.plan_axes[name])
        self._groups = {name: group.split(_colour(place, self.plan_axes, {name}), name) for name in AXES}
        self.data_axes = group.split(_colour(place, self.plan_axes, {"dp_replicate", "dp_shard"}), "data")

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def world_size(self) -> int:
        return self.group.size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def __getitem__(self, axis: str) -> Group:
        if axis not in self._groups:
            raise KeyError(f"The mesh has no axis {axis!r}; it has {', '.join(self._groups)}.")
        return self._groups[axis]

    def __repr__(self) -> str:
        axes = " x ".join(f"{name}={degree}" for name, degree in self.plan_axes.items())
        return f"Mesh({axes}, rank {self.rank} of {self.world_size})"


def _colour(place: dict[str, int], degrees: dict[str, int], along: set[str]) -> int:
    """The same number for ranks that differ on the axes `along` only."""
    colour = 0
    for name in AXES:
        colour = colour * degrees[name] + (0 if name in along else place[name])
    return colour
