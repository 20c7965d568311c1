"""What a checkpoint holds of a model under DeepSpeed: the same names, shapes and numbers as under our own engine.

So a run may change between engines, and between stages and numbers of ranks, and go on. Taking a state is a
collective here, for DeepSpeed's partitions are no rectangles: each tensor is put together and cut by rows, one at a
time, so that a rank holds one whole tensor and its share of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainfleet.errors import CheckpointError
from trainfleet.mesh import Mesh
from trainfleet.parallel.deepspeed import library
from trainfleet.parallel.deepspeed.fragments import Fragment, rows, whole
from trainfleet.parallel.loss_scale import LossScaler
from trainfleet.parallel.pieces import ModelState, memory_of_one_step
from trainfleet.plan import Plan
from trainfleet.state import Setting, ShardedArray


class NamedModel:
    """The names and shapes of what an optimizer holds, noted before DeepSpeed puts its partitions in their place."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.held = {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.held.items()}


class PartitionedModel:
    """Stateful: the parameters, persistent buffers and extra state of a model in DeepSpeed's hands."""

    def __init__(self, model: nn.Module, stage: int, zero: Any, mesh: Mesh) -> None:
        self._model, self._stage, self._zero, self._mesh = model, stage, zero, mesh
        self._state = ModelState(model)

    def _partitioned(self) -> dict[str, nn.Parameter]:
        return dict(self._model.named_parameters()) if self._stage == 3 else {}

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        partitioned = self._partitioned()
        state = self._state.state_dict()
        for name, parameter in partitioned.items():
            with library.gathered(parameter):
                state[name] = _rows_of(name, parameter.detach(), self._mesh)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        partitioned = self._partitioned()
        self._state.load_state_dict({**state, **{name: _Left(p) for name, p in partitioned.items()}})
        for name, parameter in partitioned.items():
            value = _whole_of(state[name], self._mesh)
            with library.gathered(parameter, write=True):
                parameter.copy_(value)
        if self._zero is not None:
            self._zero.refresh_fp32_params()


class _Left:
    """In place of a piece: the tensor keeps what it holds."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.local = parameter.detach().clone()


class PartitionedOptimizer:
    """Stateful: what the optimizer remembers of each parameter, from and to the partitions of stages 1 to 3."""

    def __init__(
        self, named: NamedModel, optimizer: Optimizer, fragments: Mapping[nn.Parameter, Fragment], mesh: Mesh
    ) -> None:
        self._named, self._optimizer, self._fragments, self._mesh = named, optimizer, fragments, mesh

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        blank = self._blank()
        trained = [name for name, parameter in self._named.held.items() if parameter.requires_grad]
        started, numbers = self._numbers(trained, blank)
        memory: dict[str, dict[str, Any]] = {name: {} for name in self._named.held}
        for name in trained:
            for key, value in blank.items():
                memory[name][key] = self._entry(name, key, value, numbers.get(name, {}))
        groups = [
            {key: _plain(value) for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        return {"memory": memory, "started": trained if started else [], "groups": groups}

    def _numbers(self, names: list[str], blank: Mapping[str, Any]) -> tuple[bool, dict[str, dict[str, float]]]:
        """Whether the optimizer has taken a step; and by parameter what it remembers as single numbers."""
        own: dict[str, dict[str, float]] = {}
        for name in names:
            fragment = self._fragments.get(self._named.held[name])
            if fragment is not None and (kept := self._optimizer.state.get(fragment.flat)):
                own[name] = {k: kept[k].item() for k, v in blank.items() if isinstance(v, Tensor) and v.ndim == 0}
        found: dict[str, dict[str, float]] = {}
        for each in self._mesh.data_axes.exchange(own):
            found |= each
        return bool(found), found

    def _blank(self) -> dict[str, Any]:
        """What the optimizer remembers of a parameter with one element after a step that changes nothing."""
        lone = nn.Parameter(torch.zeros(1, device=self._mesh.device))
        twin = object.__new__(type(self._optimizer))
        twin.__dict__.update(self._optimizer.__dict__)
        twin.param_groups = [{**self._optimizer.param_groups[0], "params": [lone]}]
        lone.grad = torch.zeros_like(lone)
        with torch.enable_grad():
            return memory_of_one_step(twin, {lone})[lone]

    def _entry(self, name: str, key: str, blank: Any, numbers: Mapping[str, float]) -> Any:
        fragment = self._fragments.get(self._named.held[name])
        kept = self._optimizer.state.get(fragment.flat, {}) if fragment is not None else {}
        if not isinstance(blank, Tensor):
            return kept.get(key, blank)
        if blank.ndim == 0:
            number = torch.tensor(numbers[key], dtype=blank.dtype) if numbers else blank
            return _replicated(f"{name}.{key}", number, self._mesh)
        piece = None
        if fragment is not None:
            piece = fragment.of(kept[key]) if key in kept else blank.expand(fragment.length)
        first = fragment.first if fragment is not None else 0
        made = whole(piece, first, self._named.shapes[name], blank.dtype, self._mesh)
        return _rows_of(f"{name}.{key}", made, self._mesh)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        started, trained = set(state["started"]), [n for n, p in self._named.held.items() if p.requires_grad]
        if some := started - set(trained) or (started and set(trained) - started):
            raise CheckpointError(
                f"The optimizer of the checkpoint has taken other steps of {sorted(some)[0]} than of other parameters; "
                "DeepSpeed's partitions have one number of steps.",
                hint="Go on with plan.engine=native or plan.zero=0.",
            )
        blank = self._blank()
        for flat in {fragment.flat for fragment in self._fragments.values()}:
            if not started:
                self._optimizer.state.pop(flat, None)
            elif not self._optimizer.state.get(flat):
                self._optimizer.state[flat] = {key: _grown(value, flat) for key, value in blank.items()}
        for name in trained if started else ():
            self._take(name, state["memory"][name], blank)
        for group, settings in zip(self._optimizer.param_groups, state["groups"], strict=True):
            for key, value in settings.items():
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                elif key in group:
                    group[key] = tuple(value) if isinstance(group[key], tuple) else value

    def _take(self, name: str, memory: Mapping[str, Any], blank: Mapping[str, Any]) -> None:
        fragment = self._fragments.get(self._named.held[name])
        for key, like in blank.items():
            value = memory[key]
            if not isinstance(like, Tensor):
                if fragment is not None:
                    self._optimizer.state[fragment.flat][key] = value
            elif like.ndim == 0:
                if fragment is not None:
                    self._optimizer.state[fragment.flat][key].copy_(value.local)
            else:
                made = _whole_of(value, self._mesh)  # on all ranks, also where nothing of it is kept
                if fragment is not None:
                    run = made.reshape(-1)[fragment.first : fragment.first + fragment.length]
                    fragment.of(self._optimizer.state[fragment.flat][key]).copy_(run)


class Counting(Protocol):
    """What an engine counts."""

    steps: int
    divisor: float | None
    scaler: LossScaler | None
    plan: Plan
    mesh: Mesh


class Counters:
    """Stateful: the engine's own few numbers, under the names of our own engine's."""

    def __init__(self, engine: Counting) -> None:
        self._engine = engine

    def _shares(self) -> int:
        return 1 if self._engine.scaler else self._engine.mesh.data_axes.size

    def state_dict(self) -> dict[str, Any]:
        engine = self._engine
        return {
            "steps": engine.steps,
            "step_divisor": None if engine.divisor is None else engine.divisor * self._shares(),
            "precision": Setting(engine.plan.precision),
            "loss_scale": engine.scaler.state_dict() if engine.scaler else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        engine = self._engine
        engine.steps = int(state["steps"])
        divisor = state["step_divisor"]
        engine.divisor = None if divisor is None else float(divisor) / self._shares()
        if engine.scaler is not None and state["loss_scale"] is not None:
            engine.scaler.load_state_dict(state["loss_scale"])


def _rows_of(name: str, value: Tensor, mesh: Mesh) -> ShardedArray:
    """This rank's rows of a tensor that it has whole."""
    if value.ndim == 0:
        return _replicated(name, value, mesh)
    own = rows(tuple(value.shape), mesh.data_axes)
    part = value[own].clone()
    offsets = (own.start if part.numel() else 0,) + (0,) * (value.ndim - 1)
    return ShardedArray(name=name, global_shape=tuple(value.shape), offsets=offsets, local=part)


def _replicated(name: str, value: Tensor, mesh: Mesh) -> ShardedArray:
    shape = tuple(value.shape)
    return ShardedArray(
        name=name, global_shape=shape, offsets=(0,) * len(shape), local=value.clone(), replica=mesh.rank
    )


def _whole_of(piece: ShardedArray, mesh: Mesh) -> Tensor:
    """The whole tensor, from the rows that each rank has."""
    local: Tensor = piece.local
    if local.ndim == 0:
        return local
    width = local[0].numel() if len(local) else 0
    return whole(local, piece.offsets[0] * width, piece.global_shape, local.dtype, mesh)


def _grown(blank: Any, flat: Tensor) -> Any:
    """What is remembered of one element, for as many as `flat` has."""
    if not isinstance(blank, Tensor):
        return blank
    return blank.clone() if blank.ndim == 0 else blank.to(flat.device).expand(len(flat)).clone()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
