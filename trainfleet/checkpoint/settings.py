"""The `checkpoint` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from trainfleet.checkpoint.retention import Retention
from trainfleet.errors import ConfigError
from trainfleet.plan import STRICT


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
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto`: go on from the newest whole checkpoint if there is one; `must`: fail if there is none; `never`: begin."""
    folder: str | None = None
    """Path or URL of the checkpoints. None: `checkpoints` in the run folder."""
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

    @property
    def retention(self) -> Retention:
        return Retention(last=self.keep_last, every=self.keep_every)
