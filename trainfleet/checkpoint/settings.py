"""The `checkpoint` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from trainfleet.checkpoint.retention import Retention
from trainfleet.errors import ConfigError
from trainfleet.plan import STRICT

Export: TypeAlias = Literal["fp32", "bf16"]
"""The precision of an export."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, which are kept, and whether a run goes on from one."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    every: int | None = 500
    """Save after each so many steps, and at the end. None: never."""
    keep_last: int = 3
    """Keep this many of the newest checkpoints."""
    keep_every: int | None = None
    """Keep for ever those whose step is a multiple of this. None: no others."""
    keep_best: int | None = None
    """Keep so many of those with the best `best_metric` too; evaluate at the steps that are saved. None: no others."""
    best_metric: str = "loss"
    """The metric that `keep_best` goes by: `loss`, that of the evaluation at the same step."""
    best_mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger metric is better."""
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto`: go on from the newest whole checkpoint if there is one; `must`: fail if there is none; `never`: begin."""
    folder: str | None = None
    """Path or URL of the checkpoints. None: `checkpoints` in the run folder."""
    cast: bool = False
    """Go on in another precision than the one that was saved; floats of another dtype are rounded."""
    export: Export | None = None
    """Write the model's weights as one safetensors file of this precision with each checkpoint. None: do not."""
    save_function: str | None = None
    """Import path of a function (state, step, path) that writes a further file with each checkpoint."""
    timeout_seconds: float = 600.0
    """How long the ranks wait for each other's pieces, and a save for the one before, until that save has failed."""

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ConfigError(f"checkpoint.every is {self.every}; use at least 1 step, or null for never.")
        if self.timeout_seconds <= 0:
            raise ConfigError(f"checkpoint.timeout_seconds is {self.timeout_seconds}; it must be positive.")
        if self.keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last is {self.keep_last}; keep at least 1.")
        if self.keep_every is not None and self.keep_every < 1:
            raise ConfigError(f"checkpoint.keep_every is {self.keep_every}; use at least 1 step, or null.")
        if self.keep_best is not None and self.keep_best < 1:
            raise ConfigError(f"checkpoint.keep_best is {self.keep_best}; use at least 1, or null.")

    @property
    def retention(self) -> Retention:
        return Retention(
            last=self.keep_last,
            every=self.keep_every,
            best=self.keep_best,
            metric=self.best_metric,
            mode=self.best_mode,
        )
