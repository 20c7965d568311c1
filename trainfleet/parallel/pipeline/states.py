"""What a checkpoint of a pipeline says on each rank of the stages that others hold: places for arrays, all empty.

So the state has the same structure on every rank, as that of one process, and each rank stores and reads its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from trainfleet.errors import CheckpointError
from trainfleet.parallel.pipeline.pipe import Pipeline
from trainfleet.state import ShardedArray


def absent_state(pipeline: Pipeline, present: Collection[str]) -> dict[str, ShardedArray]:
    """Of the model's parameters and persistent buffers those that are not `present`; tied ones once."""
    found: dict[str, ShardedArray] = {}
    seen: set[int] = set()
    for name, value in pipeline.shadow.model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            if name not in present:
                found[name] = _empty(name, tuple(value.shape), value.dtype)
    return found


def absent_averages(pipeline: Pipeline, present: Collection[str]) -> dict[str, ShardedArray]:
    """Of the trained parameters those that are not `present`."""
    return {
        name: _empty(name, tuple(parameter.shape), parameter.dtype)
        for name, parameter in pipeline.shadow.model.named_parameters()
        if parameter.requires_grad and name not in present
    }


def whole_memory(pipeline: Pipeline, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state over all stages; `state` is that of this one. All ranks of the axis pp call it."""
    memory = dict(state["memory"])
    theirs = pipeline.group.exchange(
        {
            "memory": {name: {key: _described(each) for key, each in held.items()} for name, held in memory.items()},
            "started": state["started"],
            "groups": len(state["groups"]),
        }
    )
    if len(numbers := {each["groups"] for each in theirs}) > 1:
        raise CheckpointError(
            f"The optimizers of the pipeline's ranks have {' and '.join(map(str, sorted(numbers)))} groups of "
            "parameters, so no checkpoint can say what belongs together. Make equally many on every rank, some of them "
            "empty (optimizers of recipes are made so)."
        )
    for each in theirs:
        for name, held in each["memory"].items():
            if name not in memory:
                memory[name] = {key: _placed(f"{name}.{key}", entry) for key, entry in held.items()}
    started = [name for each in theirs for name in each["started"]]
    names = pipeline.sorted_names(list(memory))
    return {
        **state,
        "memory": {name: memory[name] for name in names},
        "started": [name for name in names if name in set(started)],
    }


def _described(entry: Any) -> Any:
    if isinstance(entry, ShardedArray):
        return {"shape": list(entry.global_shape), "dtype": entry.dtype}
    return {"value": entry}


def _placed(name: str, entry: Any) -> Any:
    if "value" in entry:
        return entry["value"]
    return _empty(name, tuple(entry["shape"]), getattr(torch, entry["dtype"]))


def _empty(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> ShardedArray:
    """A place in an array of which this rank has nothing; a scalar cannot be empty, so it is a copy."""
    local = torch.zeros((0,) * len(shape), dtype=dtype)
    return ShardedArray(name=name, global_shape=shape, offsets=(0,) * len(shape), local=local, replica=1)
