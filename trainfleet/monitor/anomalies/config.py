"""What is watched for in a run, and what is done about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from trainfleet.errors import ConfigError
from trainfleet.plan import STRICT

POLICIES_OF_STEPS = ("loss_not_finite", "gradient_not_finite", "loss_spike", "gradient_explosion")
"""The kinds that can be told before the update of a step, so that it can be left out or undone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnomalyConfig:
    """What is watched for, and what is done: warn, skip (the update of the step), rollback (to the copy of
    train.rollback_every), or stop (save, and end with exit code 17). null: not watched for."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    loss_not_finite: Literal["auto", "warn", "skip", "rollback", "stop"] | None = "auto"
    """A loss that is NaN or infinite. auto: rollback where train.rollback_every is set, else warn."""
    gradient_not_finite: Literal["auto", "warn", "skip", "rollback", "stop"] | None = "auto"
    """A gradient whose norm is NaN or infinite; under fp16 that is the business of the loss scale. auto: as above."""
    loss_spike: Literal["warn", "skip", "rollback", "stop"] | None = "warn"
    """A loss that jumps out of its history."""
    spike_deviations: float = 7.0
    """Standard deviations (from the median absolute one) above the usual that make a spike."""
    gradient_explosion: Literal["warn", "skip", "rollback", "stop"] | None = "warn"
    """A gradient whose norm, before clipping, jumps out of its history."""
    explosion_factor: float = 10.0
    """Times the usual norm that make an explosion, where the norm is not as noisy as that."""
    skips_in_a_row: int = 10
    """Updates left out one after the other before the run stops: skipping does not help then."""
    dead_units: Literal["warn", "stop"] | None = "warn"
    """Modules most of whose units give zero for everything they see."""
    dead_share: float = 0.5
    """Share of a module's units that are too many."""
    dead_every: int = 100
    """Steps from one look at the units to the next; a look costs a few percent of its step."""
    throughput_drop: Literal["warn", "stop"] | None = "warn"
    """Steps that have become much slower than they were, for lasting_seconds; evaluations and saves do not count."""
    drop_factor: float = 2.0
    """Times the usual time a token takes that make a drop."""
    slow_rank: Literal["warn", "stop"] | None = "warn"
    """A rank that works much longer than the others at each step, for lasting_seconds, so that all wait for it."""
    slow_factor: float = 1.5
    """Times the working time of the others that make a rank slow."""
    data_starvation: Literal["warn", "stop"] | None = "warn"
    """Steps that wait for their batches, for lasting_seconds."""
    starved_share: float = 0.5
    """Share of steps that wait longer than a fifth of their time that makes a run starve."""
    lasting_seconds: float = 30.0
    """How long a throughput drop, a slow rank or a starvation lasts before it is told."""
    stalled_step: Literal["warn", "stop"] | None = "warn"
    """A step that takes longer than stall_factor times the usual and stall_floor_seconds. The rank logs in which phase
    and at which line it hangs; with stop its process ends with exit code 18 after stall_stop_seconds."""
    stall_factor: float = 10.0
    """Times the usual step."""
    stall_floor_seconds: float = 60.0
    """The least that counts as a stall."""
    stall_stop_seconds: float = 300.0
    """How long a step that stalls is waited for under `stop`, from its begin; the ranks then start anew, given
    --max-restarts. Shorter than train.timeout_seconds, or peers give it up before."""
    disk_filling: Literal["warn", "stop"] | None = "warn"
    """A disk with room for fewer than two more checkpoints, or that is full in disk_minutes at the rate of the last
    minutes."""
    disk_minutes: float = 15.0
    """How long before it is full."""
    memory_growth: Literal["warn", "stop"] | None = "warn"
    """Resident memory of a rank that grows and grows after the warm-up: a leak."""
    growth_share: float = 0.1
    """Share of the memory that it grows by before it is told, and 64 MiB at least."""

    def __post_init__(self) -> None:
        for name in ("spike_deviations", "stall_floor_seconds", "stall_stop_seconds", "disk_minutes", "growth_share"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"monitor.anomalies.{name} is {getattr(self, name)}; it must be positive.")
        for name in ("explosion_factor", "drop_factor", "slow_factor", "stall_factor"):
            if getattr(self, name) <= 1:
                raise ConfigError(f"monitor.anomalies.{name} is {getattr(self, name)}; use more than 1 (the usual).")
        for name in ("dead_share", "starved_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"monitor.anomalies.{name} is {getattr(self, name)}; a share lies between 0 and 1.")
        for name in ("skips_in_a_row", "dead_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"monitor.anomalies.{name} is {getattr(self, name)}; use 1 or more.")
        if self.lasting_seconds < 0:
            raise ConfigError(f"monitor.anomalies.lasting_seconds is {self.lasting_seconds}; use 0 or more.")

    def resolved(self, *, rolls_back: bool) -> AnomalyConfig:
        """With `auto` decided; ConfigError for a rollback where there are no copies to go back to."""
        chosen: Literal["rollback", "warn"] = "rollback" if rolls_back else "warn"
        config = replace(
            self,
            loss_not_finite=chosen if self.loss_not_finite == "auto" else self.loss_not_finite,
            gradient_not_finite=chosen if self.gradient_not_finite == "auto" else self.gradient_not_finite,
        )
        wanted = [name for name in POLICIES_OF_STEPS if getattr(config, name) == "rollback"]
        if wanted and not rolls_back:
            raise ConfigError(
                f"monitor.anomalies.{wanted[0]} is rollback, but train.rollback_every is null, so there is no copy to "
                "go back to. Set it to the steps between copies, or choose skip, stop or warn."
            )
        return config

    @property
    def forgoes_updates(self) -> bool:
        """Whether any policy may leave the update of a step out."""
        return any(getattr(self, kind, None) in ("skip", "stop") for kind in self.__slots__)
