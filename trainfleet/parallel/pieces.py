"""Model and optimizer as pieces: the one place where DTensors become ShardedArrays and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainfleet.errors import CheckpointError
from trainfleet.mesh import Mesh
from trainfleet.parallel.spread import spread_of
from trainfleet.parallel.torch_private import offsets_in_whole
from trainfleet.state import ShardedArray


def as_piece(name: str, like: Tensor, local: Tensor | None = None, *, rank: int = 0) -> ShardedArray:
    """The piece of `like` that this rank holds; with `local`, another tensor laid out in the same way.

    `rank` tells copies of whole tensors apart; those of sharded ones are told apart by their mesh.
    """
    if isinstance(like, DTensor):
        piece = like.to_local() if local is None else local
        offsets = offsets_in_whole(like)
        if piece.numel() == 0:
            offsets = tuple(0 for _ in offsets)
        coordinate = list(like.device_mesh.get_coordinate() or ())
        copy = sum(at for at, placement in zip(coordinate, like.placements) if placement.is_replicate())
        return ShardedArray(
            name=name, global_shape=tuple(like.shape), offsets=offsets, local=piece.detach(), replica=copy
        )
    piece = like if local is None else local
    return ShardedArray(
        name=name, global_shape=tuple(like.shape), offsets=(0,) * like.ndim, local=piece.detach(), replica=rank
    )


class ModelState:
    """Stateful: the parameters and persistent buffers of a spread model, by name; tied ones once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._rank = spread_of(model).mesh.rank

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        persistent = self._model.state_dict(keep_vars=True)
        for name, value in persistent.items():
            if isinstance(value, Tensor) and id(value) not in seen:
                seen.add(id(value))
                found[name] = value
        return found

    def state_dict(self) -> dict[str, Any]:
        return {name: as_piece(name, tensor, rank=self._rank) for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        for name, tensor in self._tensors().items():
            _local(tensor).copy_(state[name].local)


class OptimizerState:
    """Stateful: what an optimizer remembers of each parameter, by the parameter's name, and its groups' settings."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._mesh: Mesh = spread_of(model).mesh
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._named = {
            names[parameter]: parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter in names
        }
        strangers = sum(p not in names for group in optimizer.param_groups for p in group["params"])
        if strangers:
            raise CheckpointError(
                f"The optimizer holds {strangers} tensors that are not parameters of the model. "
                "Make it after `parallelize`, from model.parameters()."
            )

    def state_dict(self) -> dict[str, Any]:
        self._fill()
        memory: dict[str, Any] = {}
        for name, parameter in self._named.items():
            remembered = self._optimizer.state.get(parameter, {})
            memory[name] = {key: self._entry(name, key, parameter, value) for key, value in remembered.items()}
        groups = [
            {key: _plain(value) for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        return {"memory": memory, "groups": groups}

    def _entry(self, name: str, key: str, parameter: nn.Parameter, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.shape == parameter.shape:
            return as_piece(f"{name}.{key}", parameter, _local(value), rank=self._mesh.rank)
        return as_piece(f"{name}.{key}", value, rank=self._mesh.rank)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self._fill()
        for name, parameter in self._named.items():
            remembered = self._optimizer.state.get(parameter, {})
            for key, value in state["memory"][name].items():
                if isinstance(remembered.get(key), Tensor):
                    _local(remembered[key]).copy_(value.local)
                else:
                    remembered[key] = value
        for group, settings in zip(self._optimizer.param_groups, state["groups"]):
            for key, value in settings.items():
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                elif key in group:
                    group[key] = tuple(value) if isinstance(group[key], tuple) else value

    def _fill(self) -> None:
        """Make the memory of parameters that have had no gradient yet, as their first step would find it.

        Optimizers make it at a parameter's first step. A step of rate 0 with gradients of 0 makes it without
        moving anything; its count of steps is set back.
        """
        new = [p for p in self._named.values() if p.requires_grad and not self._optimizer.state.get(p)]
        if not new:
            return
        kept = {parameter: parameter.grad for parameter in self._named.values()}
        rates = [group["lr"] for group in self._optimizer.param_groups]
        values = [_local(parameter).clone() for parameter in new]
        try:
            for parameter in self._named.values():
                parameter.grad = None
            for parameter in new:
                parameter.grad = torch.zeros_like(parameter)
            for group in self._optimizer.param_groups:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
            self._optimizer.step()
        finally:
            for group, rate in zip(self._optimizer.param_groups, rates):
                group["lr"] = rate
            for parameter, gradient in kept.items():
                parameter.grad = gradient
        with torch.no_grad():
            for parameter, value in zip(new, values):
                _local(parameter).copy_(value)
                step = self._optimizer.state[parameter].get("step")
                if isinstance(step, Tensor):
                    step.zero_()
                elif step is not None:
                    self._optimizer.state[parameter]["step"] = 0


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.data
