"""DeadUnits: modules most of whose units give zero for everything that they see, so that they learn nothing.

A unit is looked at where it is used: in the input of the linear layers and convolutions behind it, which finds the
function relu as well as the module. What needs no gradient, such as pixels that are always black, is no unit. A look
is taken at one step in many, by hooks that are there for that step only, and several looks are judged together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainfleet.batch import Batch
from trainfleet.events import StepEnded
from trainfleet.monitor.anomalies import Finding, Spell
from trainfleet.parallel.layout import piece_of
from trainfleet.training.watchers.watcher import Watcher

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from trainfleet.parallel import Engine

USERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LOOKS = 3
"""That are judged together at least."""
ENOUGH = 256
"""Values that each unit gave in them at least: one that answers to one input in fifty is alive."""
NAMED = 4
"""Modules that a sentence names."""


class DeadUnits(Watcher):
    """Looks at this rank's part of the model; what it finds goes to `add`."""

    def __init__(self, add: Callable[[Finding], None], *, share: float, every: int) -> None:
        self._add, self._share, self._every = add, share, every
        self._model: nn.Module | None = None
        self._hooks: list[RemovableHandle] = []
        self._made_by: dict[int, str] = {}  # address of an output -> the activation that gave it, in this forward
        self._alive: dict[str, Tensor] = {}
        self._values: dict[str, int] = {}  # of each unit
        self._looks = 0
        self._spell = Spell()

    def start(self, engine: Engine) -> None:
        # Hooks that come and go would have the compiled model compiled anew at each look.
        self._model = None if engine.plan.compile else engine.model

    def begin(self, step: int, micro_batches: Sequence[Batch]) -> None:
        self._detach()
        if step % self._every or self._model is None:
            return
        for name, module in self._model.named_modules():
            if isinstance(module, USERS):
                self._hooks.append(module.register_forward_pre_hook(self._look(name)))
            elif type(module).__module__ == nn.ReLU.__module__:
                self._hooks.append(module.register_forward_hook(self._remember(name)))

    def _remember(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._made_by[piece_of(output).data_ptr()] = name

        return hook

    def _look(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            if not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].requires_grad:
                return
            with torch.no_grad():
                values = piece_of(inputs[0])
                units = values.ndim - 1 if isinstance(module, nn.Linear) else 1
                if values.numel() and values.ndim > units:
                    maker = self._made_by.get(values.data_ptr(), f"the input of {name}")
                    self._count(maker, values.movedim(units, -1).flatten(0, -2) if values.ndim > 1 else values[None])

        return hook

    def _count(self, name: str, values: Tensor) -> None:
        """Values x units."""
        alive = (values != 0).any(0)
        before = self._alive.get(name)
        self._alive[name] = alive if before is None or before.shape != alive.shape else before.logical_or_(alive)
        self._values[name] = self._values.get(name, 0) + len(values)

    def end(self, ended: StepEnded) -> None:
        if not self._hooks:
            return
        self._detach()
        self._looks += 1
        if self._looks < LOOKS or min(self._values.values(), default=0) < ENOUGH:
            return
        dead = {name: 1.0 - float(alive.float().mean()) for name, alive in self._alive.items()}
        self._alive, self._values, self._looks = {}, {}, 0
        found = sorted((name for name in dead if dead[name] >= self._share), key=lambda name: -dead[name])
        if found and self._spell.begins(ended.step):
            self._add(Finding(kind="dead_units", what=self._sentence(found, dead), module=found[0]))
        elif not found and (since := self._spell.ends()) is not None:
            what = f"The units that gave zero for everything live again, after {ended.step - since} steps"
            self._add(Finding(kind="dead_units", what=what, is_over=True))

    def _sentence(self, found: Sequence[str], dead: dict[str, float]) -> str:
        shares = ", ".join(f"{dead[name]:.0%} of {name}" for name in found[:NAMED])
        more = f" and of {len(found) - NAMED} more" if len(found) > NAMED else ""
        return f"Units gave zero for everything they saw in {LOOKS} looks or more: {shares}{more}"

    def close(self) -> None:
        self._detach()
        self._model = None

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._made_by = [], {}
