"""Recipe: everything a run is made of, as one value; nothing else knows all sections."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from trainfleet.checkpoint import CheckpointConfig
from trainfleet.data import BatchConfig, DataConfig
from trainfleet.errors import ConfigError
from trainfleet.monitor import MonitorConfig
from trainfleet.plan import STRICT, Plan
from trainfleet.training.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The module to train."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str | None = None
    """Import path of a class or function that returns an nn.Module, such as `package.module:Name`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments."""
    init_from: str | None = None
    """Weights, and nothing else, that the run begins with: a run folder, a checkpoint, safetensors, a torch.save file,
    a distributed checkpoint, or hf:NAME of the Hugging Face hub."""
    deferred: bool = False
    """Build on the meta device, so that no host ever holds the whole model. The numbers are the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The optimizer and its rate."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str = "adamw"
    """Short name (adamw, adam, sgd, …) or import path of a torch.optim.Optimizer."""
    lr: float = 3e-4
    """The base learning rate. It never follows the number of processes."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the optimizer, such as `weight_decay` and `betas`."""
    lr_reference_batch: int | None = None
    """Global batch for which `lr` is meant; with it the rate is scaled to the global batch of this run."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """How the rate is scaled where lr_reference_batch is given."""

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ConfigError(f"optimizer.lr is {self.lr}; a learning rate is not negative.")
        if self.lr_reference_batch is not None and self.lr_reference_batch < 1:
            raise ConfigError(
                f"optimizer.lr_reference_batch is {self.lr_reference_batch}; a batch has at least 1 sample."
            )

    def rate_for(self, global_batch: int) -> float:
        """The base rate of a run with this global batch."""
        if self.lr_reference_batch is None:
            return self.lr
        ratio = global_batch / self.lr_reference_batch
        return float(self.lr * (ratio if self.lr_scaling == "linear" else ratio**0.5))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The loop."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    steps: int | None = None
    """Optimizer steps of the whole run. null: what `epochs` makes, or 1000."""
    epochs: int | None = None
    """Passes over the training data, in place of `steps`; the data must know its length."""
    seed: int = 0
    """Of the model's first numbers, its dropout, and (unless data.seed says otherwise) the order of the data."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient over the whole mesh; null: not clipped."""
    evaluate_every: int | Literal["epoch"] | None = None
    """Steps between evaluations, or `epoch`: after each; null: only at the end. Needs data.evaluation."""
    evaluate_batches: int | None = None
    """Batches a rank of one evaluation; null: all of data.evaluation."""
    early_stopping: int | None = None
    """Stop after so many evaluations without a smaller loss; null: never."""
    ema_decay: float | None = None
    """Average the weights with this decay, and evaluate the averages; null: no average."""
    check_replicas_every: int | None = 500
    """Steps between checks that copies of parameters are still equal to the bit; null: never."""
    max_retries: int = 0
    """How often a run of one process goes on from its newest checkpoint after an error. The same error at the same
    step twice ends it. Ranks of several processes are started anew by `--max-restarts`."""
    rollback_every: int | None = None
    """Steps between copies of all states in memory, to which the run goes back where monitor.anomalies says so: by
    itself when a loss or a gradient is not finite. The batches in between are left out. null: none."""
    max_rollbacks: int = 3
    """Rollbacks without a new best step in between, before the run ends with an error."""
    timeout_seconds: float = 600.0
    """How long a rank waits for the others before it takes them for lost and ends: longer than the slowest of them can
    be late, as in an evaluation or a compilation. With `--max-restarts` the ranks then start anew."""
    step_fn: str | None = None
    """Import path of (engine, micro_batches) -> LossSum that takes the place of engine.forward_backward."""
    finish: str | None = None
    """Import path of (model, mesh, folder) -> mapping, called on all ranks at the end: a sample text, baselines."""
    observers: tuple[str, ...] = ()
    """Import paths of further observers: classes without arguments."""

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "evaluate_every", "evaluate_batches", "early_stopping", "check_replicas_every"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"train.{name} is {value}; use 1 or more.")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"train.steps is {self.steps} and train.epochs {self.epochs}; give one of them, and null for the other."
            )
        if self.rollback_every is not None and self.rollback_every < 1:
            raise ConfigError(f"train.rollback_every is {self.rollback_every}; use 1 step or more, or null.")
        if self.timeout_seconds <= 0:
            raise ConfigError(f"train.timeout_seconds is {self.timeout_seconds}; it must be positive.")
        if self.max_retries < 0 or self.max_rollbacks < 0:
            raise ConfigError("train.max_retries and train.max_rollbacks cannot be negative; use 0 for none.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"train.clip_norm is {self.clip_norm}; use a positive norm, or null for none.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay is {self.ema_decay}; it lies between 0 and 1, often 0.999.")

    def steps_of(self, batches: object, accumulation: int) -> int:
        """Optimizer steps of the whole run on this stream of a rank's micro-batches; ConfigError where it has no end.

        The last step of the last epoch is filled up from the next.
        """
        if self.epochs is None:
            return self.steps or 1000
        length = getattr(batches, "batches_per_epoch", None)
        if not isinstance(length, int):
            raise ConfigError(
                f"train.epochs is {self.epochs}, but the training data does not know its length. Give train.steps."
            )
        return math.ceil(self.epochs * length / accumulation)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole run: what is trained, on what, how it is spread, and what is written."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    plan: Plan = field(default_factory=Plan)
    loss: str = "cross_entropy"
    """cross_entropy, mse, model (its output is or holds the loss), or import path of (output, batch) -> LossSum."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    folder: str = "runs/run"
    """Where the run is written: resolved recipe, metrics, pictures, checkpoints."""

    def __post_init__(self) -> None:
        self.monitor.anomalies.resolved(rolls_back=self.train.rollback_every is not None)
