"""Schedules: the learning rate of each step as a multiple of the base rate, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainfleet.errors import ConfigError
from trainfleet.plan import STRICT

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """How the learning rate goes over the run."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str = "cosine"
    """constant, linear, cosine, wsd (warm-up, stable, decay), or import path of (step, steps) -> multiple."""
    warmup_steps: int = 0
    """Steps over which the rate rises from 0 in a straight line."""
    final: float = 0.1
    """The multiple of the base rate at the last step (linear, cosine, wsd)."""
    decay_fraction: float = 0.2
    """The last part of the run in which wsd falls."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps is {self.warmup_steps}; use 0 or more.")
        if not 0 <= self.final <= 1:
            raise ConfigError(f"schedule.final is {self.final}; it is a multiple between 0 and 1.")
        if not 0 < self.decay_fraction <= 1:
            raise ConfigError(f"schedule.decay_fraction is {self.decay_fraction}; it is above 0 and at most 1.")
        if ":" not in self.name and self.name not in SHAPES:
            raise ConfigError(f"schedule.name is {self.name!r}; use one of {', '.join(SHAPES)}, or an import path.")


def multiple(config: ScheduleConfig, step: int, steps: int) -> float:
    """The multiple of the base rate for the step that makes `step` of `steps` taken, counted from 1."""
    if step <= config.warmup_steps:
        return step / max(1, config.warmup_steps)
    if ":" in config.name:
        from trainfleet.imports import load_object

        return float(load_object(config.name, key="schedule.name")(step, steps))
    after_warmup = max(1, steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / after_warmup)
    return SHAPES[config.name](progress, config)


class Rates:
    """The learning rates of an optimizer, each as a multiple of what it began with."""

    def __init__(self, optimizer: Optimizer, config: ScheduleConfig) -> None:
        self._optimizer, self._config = optimizer, config
        self._base = [float(group["lr"]) for group in optimizer.param_groups]

    def set(self, step: int, steps: int) -> float:
        """Those for the step that makes `step` of `steps` taken; the first of them."""
        factor = multiple(self._config, step, steps)
        for group, base in zip(self._optimizer.param_groups, self._base):
            group["lr"] = base * factor
        return self._base[0] * factor


def _constant(progress: float, config: ScheduleConfig) -> float:
    return 1.0


def _linear(progress: float, config: ScheduleConfig) -> float:
    return 1.0 - (1.0 - config.final) * progress


def _cosine(progress: float, config: ScheduleConfig) -> float:
    return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _wsd(progress: float, config: ScheduleConfig) -> float:
    """Hu et al., MiniCPM, arXiv:2404.06395, with a decay in a straight line."""
    falling = max(0.0, progress - (1.0 - config.decay_fraction)) / config.decay_fraction
    return 1.0 - (1.0 - config.final) * falling


SHAPES: dict[str, Callable[[float, ScheduleConfig], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
}
