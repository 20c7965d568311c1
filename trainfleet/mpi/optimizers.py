"""SGD, momentum, Adam and AdamW as functions of one parameter, so that anyone may hold any piece of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from trainfleet.mpi.arrays import Array, namespace


class Optimizer(Protocol):
    """A rule for one parameter, element by element: a piece of it is treated as the whole would be."""

    learning_rate: float

    @property
    def memories(self) -> tuple[str, ...]:
        """What it remembers of a parameter: arrays of its shape, zero at first."""
        ...

    def update(self, parameter: Array, gradient: Array, memory: dict[str, Array], step: int) -> Array:
        """The new parameter after step 1, 2, ...; `memory` is changed."""
        ...


@dataclass(kw_only=True)
class SGD:
    """w - lr g, with g + decay w for g; with momentum v <- momentum v + g, and w - lr v (Polyak 1964)."""

    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    """Step by g + momentum v instead of v (Sutskever et al., ICML 2013)."""
    weight_decay: float = 0.0

    @property
    def memories(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def update(self, parameter: Array, gradient: Array, memory: dict[str, Array], step: int) -> Array:
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        if self.momentum:
            memory["momentum"] = self.momentum * memory["momentum"] + gradient
            gradient = gradient + self.momentum * memory["momentum"] if self.nesterov else memory["momentum"]
        return parameter - self.learning_rate * gradient


def Momentum(*, learning_rate: float, momentum: float = 0.9, weight_decay: float = 0.0) -> SGD:
    """SGD with momentum."""
    return SGD(learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay)


@dataclass(kw_only=True)
class Adam:
    """w - lr m' / (sqrt(v') + eps), m' and v' freed of their start: Kingma & Ba, arXiv:1412.6980, algorithm 1."""

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @property
    def memories(self) -> tuple[str, ...]:
        return ("mean", "square")

    def update(self, parameter: Array, gradient: Array, memory: dict[str, Array], step: int) -> Array:
        parameter, gradient = self._decay(parameter, gradient)
        (one, two), xp = self.betas, namespace(gradient)
        memory["mean"] = one * memory["mean"] + (1 - one) * gradient
        memory["square"] = two * memory["square"] + (1 - two) * gradient * gradient
        deviation = xp.sqrt(memory["square"]) / math.sqrt(1 - two**step) + self.eps
        return parameter - self.learning_rate / (1 - one**step) * memory["mean"] / deviation

    def _decay(self, parameter: Any, gradient: Any) -> tuple[Any, Any]:
        return parameter, (gradient + self.weight_decay * parameter if self.weight_decay else gradient)


@dataclass(kw_only=True)
class AdamW(Adam):
    """Adam with the decay beside the gradient: Loshchilov & Hutter, arXiv:1711.05101, algorithm 2."""

    weight_decay: float = 0.01

    def _decay(self, parameter: Any, gradient: Any) -> tuple[Any, Any]:
        return parameter * (1 - self.learning_rate * self.weight_decay), gradient
