"""Layers placed on ranks, one stretch each: the plainest model parallelism, where one rank works at a time.

It needs no schedule and saves only memory; `pipeline` keeps the ranks busy with several micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainfleet.balance import cut
from trainfleet.comm.group import Group
from trainfleet.errors import PlanError
from trainfleet.mpi.layers import Layer, Sequential


def place_layers(model: Sequential, group: Group, costs: Sequence[float] | None = None) -> Sequential:
    """The stretch of layers of this rank, under their names in the whole; the costliest stretch is as cheap as can be.

    `costs` are those of the layers; without them a layer costs its parameters, and one without any next to nothing.
    """
    names = list(model.layers)
    if len(names) < group.size:
        raise PlanError(f"{len(names)} layers cannot be placed on {group.size} ranks. Use pp = {len(names)} or less.")
    if costs is None:
        costs = [1 + num_parameters(layer) for layer in model.layers.values()]
    part = cut(costs, group.size)[group.rank]
    return Sequential({names[index]: model.layers[names[index]] for index in part})


def num_parameters(layer: Layer) -> int:
    return sum(int(np.prod(parameter.shape, dtype=np.int64)) for parameter in layer.parameters.values())
