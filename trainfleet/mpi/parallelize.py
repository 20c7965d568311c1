"""parallelize: spread a NumPy model over a mesh, in one visible order; every rank passes the same whole model."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainfleet.codec import Codec
from trainfleet.comm.group import Group
from trainfleet.errors import PlanError
from trainfleet.mpi.arrays import Array, to_numpy
from trainfleet.mpi.attention import SelfAttention
from trainfleet.mpi.average import refuse_unlike
from trainfleet.mpi.layers import GELU, Layer, Linear, ReLU, Sequential, Tanh
from trainfleet.mpi.linear import split_linear
from trainfleet.mpi.mesh import Mesh
from trainfleet.mpi.optimizers import Optimizer
from trainfleet.mpi.placement import place_layers
from trainfleet.mpi.recompute import Recompute
from trainfleet.mpi.zero import Sharded, Zero

_ELEMENTWISE = (GELU, ReLU, Tanh)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """This rank's part of a model, and what is needed to train and to save it."""

    model: Sequential
    optimizer: Zero
    mesh: Mesh
    wholes: dict[str, tuple[tuple[int, ...], Any]]
    """Shape and dtype of every parameter of the whole model, also of those that other ranks hold."""


def parallelize(model: Sequential, optimizer: Optimizer, mesh: Mesh, *, codec: Codec | None = None) -> Spread:
    """Spread `model` as the plan of `mesh` says: split layers, place them, keep less, share the optimizer.

    PeerError or PlanError names the first parameter that is not alike on all ranks.
    The order matters: the parameters of a layer are split over `tp` before its bands are shared over `dp_shard`.
    """
    plan = mesh.plan
    refuse_unlike(list(model.parameters.items()), mesh.group)
    refuse_other_numbers(model, mesh.group)
    wholes = {name: (tuple(value.shape) or (1,), value.dtype) for name, value in model.parameters.items()}
    if plan.tp > 1:
        model = split_layers(model, mesh["tp"])
    if plan.pp > 1:
        model = place_layers(model, mesh["pp"])
    zero = Zero(optimizer, plan.zero, mesh["dp_shard"], replicas=mesh["dp_replicate"], codec=codec)
    zero.register(model.parameters)
    if plan.zero >= 2:
        model = Sequential({name: Sharded(layer, zero, name) for name, layer in model.layers.items()})
    if plan.recompute == "blocks":
        model = Recompute(model, max(1, round(math.sqrt(len(model.layers)))))
    return Spread(model=model, optimizer=zero, mesh=mesh, wholes=wholes)


def refuse_other_numbers(model: Sequential, group: Group) -> None:
    """PlanError where a rank begins with other numbers than rank 0: what they train would be no common model."""
    checks = [[name, zlib.crc32(_bytes(value))] for name, value in model.parameters.items()]
    first, *others = group.exchange(checks)
    for rank, theirs in enumerate(others, start=1):
        for (name, mine), (_, check) in zip(first, theirs, strict=True):
            if mine != check:
                raise PlanError(
                    f"Parameter {name!r} begins with other numbers on rank {rank} than on rank 0. "
                    "Draw them from a generator of the same seed on every rank."
                )


def _bytes(value: Array) -> Any:
    return np.ascontiguousarray(to_numpy(value)).reshape(-1).view(np.uint8)


def split_layers(model: Sequential, group: Group) -> Sequential:
    """Attention by heads, and linear layers with one activation between them as pairs; names stay.

    What cannot be split so is computed whole on every rank. PlanError where that is everything.
    """
    split = _split(model, group)
    if not split.cuts:
        raise PlanError(
            f"tp is {group.size}, but no layer of this model can be split: it has no attention, and no two linear "
            "layers with an activation between them. Use tp = 1."
        )
    return split


def _split(model: Sequential, group: Group) -> Sequential:
    names = list(model.layers)
    found: dict[str, Layer] = {}
    for at, name in enumerate(names):
        layer = model.layers[name]
        if name in found:
            continue
        following = [model.layers[each] for each in names[at + 1 : at + 3]]
        if isinstance(layer, SelfAttention):
            found[name] = layer.split(group)
        elif isinstance(layer, Sequential):
            found[name] = _split(layer, group)
        elif (
            isinstance(layer, Linear)
            and len(following) == 2
            and isinstance(following[0], _ELEMENTWISE)
            and isinstance(following[1], Linear)
        ):
            found[name] = split_linear(layer, group, "column")
            found[names[at + 1]] = following[0]
            found[names[at + 2]] = split_linear(following[1], group, "row")
        else:
            found[name] = layer
    return model.with_layers(found)
