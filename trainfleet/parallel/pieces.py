"""Model and optimizer as pieces: the one place where DTensors become ShardedArrays and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainfleet.errors import CheckpointError
from trainfleet.mesh import Axes
from trainfleet.parallel.layout import axes_of, piece_of
from trainfleet.parallel.optimizers import shard_safe
from trainfleet.parallel.pipeline.states import absent_state, whole_memory
from trainfleet.parallel.spread import spread_of
from trainfleet.parallel.torch_private import offsets_in_whole
from trainfleet.state import ShardedArray


def as_piece(
    name: str, like: Tensor, local: Tensor | None = None, *, mesh: Axes | None = None, copy: int = 0
) -> ShardedArray:
    """The piece of `like` that this rank holds; with `local`, another tensor laid out in the same way.

    Copies are told apart by this rank's place on the axes of `mesh` over which the tensor is not split; without a
    mesh, on those of the DTensor's own. Of a pipeline's ranks few hold it: `copy` counts those before this one.
    """
    if isinstance(like, DTensor):
        piece = like.to_local() if local is None else local
        offsets = offsets_in_whole(like)
        if piece.numel() == 0:
            offsets = tuple(0 for _ in offsets)
        coordinate = list(like.device_mesh.get_coordinate() or ())
        copy += sum(at for at, placement in zip(coordinate, like.placements) if placement.is_replicate())
        if mesh is not None:
            copy += sum(mesh[axis].rank for axis in mesh.plan_axes if axis != "pp" and axis not in axes_of(like))
        return ShardedArray(
            name=name, global_shape=tuple(like.shape), offsets=offsets, local=piece.detach(), replica=copy
        )
    piece = like if local is None else local
    return ShardedArray(
        name=name,
        global_shape=tuple(like.shape),
        offsets=(0,) * like.ndim,
        local=piece.detach(),
        replica=copy + _place_beside_stages(mesh) if mesh is not None else copy,
    )


def _place_beside_stages(mesh: Axes) -> int:
    """0 for one rank of each stage, and only for that."""
    if "pp" not in mesh.plan_axes:
        return mesh.rank
    return sum(mesh[axis].rank for axis in mesh.plan_axes if axis != "pp")


class ModelState:
    """Stateful: the parameters, persistent buffers and extra state of a spread model, by name; tied ones once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._spread = spread_of(model)

    def _entries(self) -> dict[str, Any]:
        self._spread.rest()
        found: dict[str, Any] = {}
        seen: set[int] = set()
        for name, value in self._model.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                found[name] = value
            elif id(value) not in seen:
                seen.add(id(value))
                found[name] = value
        return found

    @torch.no_grad()  # in which the piece of a DTensor costs no step of autograd
    def state_dict(self) -> dict[str, Any]:
        mesh, pipeline = self._spread.mesh, self._spread.pipeline
        found = {
            name: as_piece(name, value, mesh=mesh, copy=self._spread.copy_of(name))
            if isinstance(value, Tensor)
            else value
            for name, value in self._entries().items()
        }
        return found if pipeline is None else {**found, **absent_state(pipeline, found)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        for name, value in self._entries().items():
            if isinstance(value, Tensor):
                piece_of(value).copy_(state[name].local)
            else:  # what a module's own get_extra_state gave
                path, _, _ = name.rpartition(".")
                self._model.get_submodule(path).set_extra_state(state[name])


class OptimizerState:
    """Stateful: what an optimizer remembers of each parameter, by the parameter's name, and its groups' settings.

    Optimizers make their memory at a parameter's first gradient. A checkpoint has a place for it before that, so that
    every run can read every other's; `started` says where there is something in it.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._spread = spread_of(model)
        self._spread.rest()
        names = {parameter: name for name, parameter in model.named_parameters()}
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if strangers := sum(parameter not in names for parameter in held):
            raise CheckpointError(
                f"The optimizer holds {strangers} tensors that are not parameters of the model. "
                "Make it after `parallelize`, from model.parameters()."
            )
        self._named = {names[parameter]: parameter for parameter in held}

    def state_dict(self) -> dict[str, Any]:
        memories = self._memories()
        with torch.no_grad():
            return self._state_of(memories)

    def _state_of(self, memories: dict[str, dict[str, Any]]) -> dict[str, Any]:
        started = [name for name, parameter in self._named.items() if self._optimizer.state.get(parameter)]
        groups = [
            {key: _plain(value) for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        state = {
            "memory": {
                name: {key: self._entry(name, key, value) for key, value in memory.items()}
                for name, memory in memories.items()
            },
            "started": started,
            "groups": groups,
        }
        pipeline = self._spread.pipeline
        return state if pipeline is None else whole_memory(pipeline, state)

    def _entry(self, name: str, key: str, value: Any) -> Any:
        parameter = self._named[name]
        if not isinstance(value, Tensor):
            return value
        mesh, copy = self._spread.mesh, self._spread.copy_of(name)
        if value.shape == parameter.shape or (value.ndim and value.shape == piece_of(parameter).shape):
            return as_piece(f"{name}.{key}", parameter, piece_of(value), mesh=mesh, copy=copy)
        return as_piece(f"{name}.{key}", value, mesh=mesh, copy=copy)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        memories, started = self._memories(), set(state["started"])
        for name, parameter in self._named.items():
            if name not in started:
                self._optimizer.state.pop(parameter, None)
                continue
            memory = memories[name]
            for key, value in state["memory"][name].items():
                if isinstance(memory.get(key), Tensor):
                    piece_of(memory[key]).copy_(value.local)
                else:
                    memory[key] = value
            self._optimizer.state[parameter] = memory
        for group, settings in zip(self._optimizer.param_groups, state["groups"], strict=True):
            for key, value in settings.items():
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                elif key in group:
                    group[key] = tuple(value) if isinstance(group[key], tuple) else value

    def _memories(self) -> dict[str, dict[str, Any]]:
        """What the optimizer remembers of each parameter; of one without a gradient yet, what it would after one.

        That is found by a step of rate 0 with gradients of 0, taken by a twin of the optimizer that shares nothing
        with it but the parameters, which keep their values.
        """
        new = {p for p in self._named.values() if p.requires_grad and not self._optimizer.state.get(p)}
        made: dict[nn.Parameter, dict[str, Any]] = {}
        kept = [(parameter, parameter.grad, piece_of(parameter).clone()) for parameter in new]
        try:
            for parameter in new:
                parameter.grad = torch.zeros_like(parameter)
            for part in getattr(self._optimizer, "parts", (self._optimizer,)):
                made |= memory_of_one_step(part, new) if new else {}
        finally:
            with torch.no_grad():
                for parameter, gradient, value in kept:
                    parameter.grad = gradient
                    piece_of(parameter).copy_(value)
        return {name: made.get(p) or self._optimizer.state.get(p, {}) for name, p in self._named.items()}


def memory_of_one_step(optimizer: Optimizer, parameters: set[nn.Parameter]) -> dict[nn.Parameter, dict[str, Any]]:
    """What `optimizer` would remember of those of its `parameters` after a step of rate 0; it is left as it is."""
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.__dict__.pop("step", None)  # a schedule's wrapper would step the optimizer itself
    memory: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    twin.state = memory
    twin.param_groups = []
    for group in optimizer.param_groups:
        still = {key: 0.0 for key in ("lr", "weight_decay") if isinstance(group.get(key), float | int)}
        copied = {key: value.clone() for key, value in group.items() if isinstance(value, Tensor)}
        if "lr" in copied:
            copied["lr"].zero_()
        members = [parameter for parameter in group["params"] if parameter in parameters]
        twin.param_groups.append({**group, **copied, **still, "params": members})
    shard_safe(twin).step()
    return dict(memory)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
