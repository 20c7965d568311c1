"""Ranks that compute one copy of a model together must get the same micro-batches: held against each other once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from trainfleet.batch import Batch, arrays
from trainfleet.errors import DataError
from trainfleet.mesh import Mesh
from trainfleet.parallel.replicas import digests
from trainfleet.plan import MODEL_AXES


def refuse_unlike_batches(micro_batches: Sequence[Batch], mesh: Mesh) -> None:
    """A collective over all ranks: DataError, on each of them, where ranks of one tp, cp or pp group got others.

    The error names the first array that differs, and the ranks.
    """
    if not set(MODEL_AXES) & set(mesh.plan_axes):
        return
    found = {
        f"micro-batch {i + 1}, {name}": array.contiguous()
        for i, batch in enumerate(micro_batches)
        for name, array in _named(batch, "")
        if isinstance(array, Tensor)
    }
    kinds = {name: f"{array.dtype} {list(array.shape)}" for name, array in found.items()}
    told = {"data": mesh.data_axes.rank, "kinds": kinds, "digests": digests(found)}
    firsts: dict[int, tuple[int, dict[str, Any]]] = {}
    for rank, theirs in enumerate(mesh.world.exchange(told)):
        first, ours = firsts.setdefault(theirs["data"], (rank, theirs))
        names = [*ours["kinds"], *(name for name in theirs["kinds"] if name not in ours["kinds"])]
        for name in names:
            if any(ours[key].get(name) != theirs[key].get(name) for key in ("kinds", "digests")):
                axes = " and ".join(f"plan.{axis}" for axis in MODEL_AXES if axis in mesh.plan_axes)
                raise DataError(
                    f"Ranks {first} and {rank} compute one copy of the model together ({axes}), but got other data: "
                    f"{name} is not the same.",
                    hint="Deal batches over the ranks that see different data: rank=mesh.data_axes.rank, "
                    "world_size=mesh.data_axes.size, in the loader or sampler.",
                )


def _named(batch: Batch, path: str) -> Iterator[tuple[str, Any]]:
    """Every array with the keys and places that lead to it."""
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _named(value, f"{path}.{key}" if path else str(key))
    elif isinstance(batch, list | tuple):
        for i, value in enumerate(batch):
            yield from _named(value, f"{path}[{i}]")
    else:
        for i, array in enumerate(arrays(batch)):
            yield path + (f" array {i + 1}" if array is not batch else ""), array
