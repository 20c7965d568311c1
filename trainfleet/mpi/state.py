"""The state of a spread model as ShardedArrays, for any Checkpointer: it loads at any number of ranks and any plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainfleet.mpi.arrays import Array, like, to_numpy
from trainfleet.mpi.parallelize import Spread
from trainfleet.state import ShardedArray


class _Pieces:
    """Where each array of this rank lies in the whole."""

    def __init__(self, spread: Spread) -> None:
        self._spread = spread
        self._mesh = spread.mesh
        self._cuts = spread.model.cuts

    def piece(self, name: str, held: Array | None, *, label: str, banded: bool) -> ShardedArray:
        """`held` under its place; empty where another stage of the pipeline has the parameter."""
        shape, dtype = self._spread.wholes[name]
        offsets = [0] * len(shape)
        if held is None:
            empty = np.empty((0,) * len(shape), dtype)
            return ShardedArray(name=label, global_shape=shape, offsets=tuple(offsets), local=empty, replica=1)
        copies = self._mesh["dp_replicate"].rank
        if name in self._cuts:
            dim, group = self._cuts[name]
            offsets[dim] = group.rank * (shape[dim] // group.size)
        else:
            copies += self._mesh["tp"].rank
        if banded:
            offsets[0] += self._spread.optimizer.rows(name)[0]
        else:
            copies += self._mesh["dp_shard"].rank
        local = to_numpy(held)
        local = local.reshape(local.shape or (1,))
        if local.size == 0:
            offsets = [0] * len(shape)
        return ShardedArray(name=label, global_shape=shape, offsets=tuple(offsets), local=local, replica=copies)


class ModelState:
    """Stateful: the parameters by name."""

    def __init__(self, spread: Spread) -> None:
        self._spread = spread

    def state_dict(self) -> dict[str, Any]:
        pieces, parameters = _Pieces(self._spread), self._spread.model.parameters
        banded = self._spread.optimizer.stage == 3
        return {
            name: pieces.piece(name, parameters.get(name), label=name, banded=banded) for name in self._spread.wholes
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        parameters = self._spread.model.parameters
        for name in list(parameters):
            held = parameters[name]
            parameters[name] = like(held, np.array(to_numpy(state[name].local)).reshape(held.shape))


class OptimizerState:
    """Stateful: what the optimizer remembers of each parameter, by name, and its number of steps."""

    def __init__(self, spread: Spread) -> None:
        self._spread = spread

    def state_dict(self) -> dict[str, Any]:
        pieces, zero = _Pieces(self._spread), self._spread.optimizer
        return {
            "memory": {
                name: {
                    key: pieces.piece(
                        name, zero.memory.get(name, {}).get(key), label=f"{name}.{key}", banded=zero.stage > 0
                    )
                    for key in zero.optimizer.memories
                }
                for name in self._spread.wholes
            },
            "steps": zero.steps,
            "learning_rate": zero.optimizer.learning_rate,
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        zero = self._spread.optimizer
        zero.steps = int(state["steps"])
        zero.optimizer.learning_rate = float(state["learning_rate"])
        for name, memory in zero.memory.items():
            for key, held in memory.items():
                memory[key] = like(held, np.array(to_numpy(state["memory"][name][key].local)).reshape(held.shape))
