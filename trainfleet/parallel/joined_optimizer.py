"""Several optimizers as one, so that different parameters can have different ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from trainfleet.errors import ConfigError


class JoinedOptimizer(Optimizer):
    """Several optimizers as one, each for its own parameters: one list of groups, one state, one step."""

    def __init__(self, *parts: Optimizer) -> None:
        self._parts: tuple[Optimizer, ...] = ()
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        for part in parts:
            self.state.update(part.state)
        self._share()

    @property
    def parts(self) -> tuple[Optimizer, ...]:
        return self._parts

    def _share(self) -> None:
        first = 0
        for part in self._parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._parts:
            raise ConfigError("Parameters cannot be added to joined optimizers; build them anew with all parameters.")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()
