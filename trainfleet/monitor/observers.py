"""Which observers a run has."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from trainfleet.errors import ConfigError, DependencyError
from trainfleet.events import Observer
from trainfleet.monitor.alerts import Alert, Alerts
from trainfleet.monitor.anomalies import AnomalyConfig
from trainfleet.monitor.console import Console
from trainfleet.monitor.csv_table import CsvTable
from trainfleet.monitor.curve import LossCurve
from trainfleet.monitor.jsonl import JsonLines
from trainfleet.monitor.profiling.step_range import MemoryConfig, ProfileConfig, refuse_overlap
from trainfleet.monitor.run_folder import RunFolder
from trainfleet.monitor.samples import Samples
from trainfleet.monitor.services import Mlflow, MlflowConfig, Prometheus, PrometheusConfig, WandB, WandbConfig
from trainfleet.monitor.system import SystemSampler
from trainfleet.monitor.tensorboard import TensorBoard
from trainfleet.plan import STRICT

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig:
    """What is shown and written while a run goes on, by the first rank alone."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    log_interval: int = 10
    """Steps from one plain line or TensorBoard point to the next. Raise it when steps are much faster than a second."""
    console: bool = True
    """Progress on standard output. Switch it off in a script that prints its own."""
    jsonl: bool = True
    """Every event in metrics.jsonl; a resumed run's picture needs it. Switch it off where disks are precious."""
    csv: bool = False
    """Every number in metrics.csv too, a row for each. Switch it on for tools that read no JSON."""
    tensorboard: bool = True
    """Files for TensorBoard. Switch it off if nobody looks, or to train without the extra `monitor`."""
    curve: bool = True
    """The picture loss.png, at evaluations and at the end. Switch it off to train without the extra `monitor`."""
    system: bool = True
    """Processor, memory, disk, network and GPU of each host and rank, every log_interval steps. A look takes a
    millisecond; switch it off where that is too much."""
    alerts: tuple[str | Alert, ...] | str = ()
    """When to tell somebody: lines such as `loss > 5 for 20 steps` or `anomaly slow_rank`, import paths of functions
    (row) -> bool or text, or sections with `when` and whom to tell: `command`, `webhook`."""
    observer_deadline_seconds: float = 60.0
    """How long the loop waits for an observer that is not ours, at each event, before it leaves it out."""
    wandb: WandbConfig | str | None = None
    """Weights & Biases (extra `wandb`): a section, or the name of a project. null: nothing is sent."""
    mlflow: MlflowConfig | str | None = None
    """MLflow (extra `mlflow`): a section, or the URI of a tracking server or store. null: nothing is sent."""
    prometheus: PrometheusConfig | int | None = None
    """An endpoint for Prometheus (extra `prometheus`): a section, or a port of the loopback. null: none."""
    mfu: bool = True
    """Model FLOPs utilisation: the share of the devices' peak that the model makes use of. Known from step log_interval
    on, when the model runs once more, on tensors without numbers. Switch it off where its forward must not."""
    flops_per_token: float | None = None
    """FLOPs of forward and backward for one token; null: counted. Give it where custom operators escape the count."""
    peak_flops: float | None = None
    """Peak FLOP/s of one device; null: by the data sheet of the GPU, or measured on a processor."""
    anomalies: AnomalyConfig = field(default_factory=AnomalyConfig)
    memory: MemoryConfig | int | str | None = None
    """Report the memory of a step: {steps: 3}, or 3, or 3-8 to see also what grows; null: none."""
    profile: ProfileConfig | int | str | None = None
    """Trace steps: {steps: 10-12}, or 10-12; null: none."""

    def __post_init__(self) -> None:
        for name in ("flops_per_token", "peak_flops"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"monitor.{name} is {value}; it is a positive number, or null to have it found.")
        self.each_alert  # noqa: B018  # raises what is wrong with one
        if isinstance(self.prometheus, int):
            PrometheusConfig(port=self.prometheus)
        if self.observer_deadline_seconds <= 0:
            raise ConfigError(
                f"monitor.observer_deadline_seconds is {self.observer_deadline_seconds}; it must be positive."
            )
        if self.log_interval < 1:
            raise ConfigError(
                f"monitor.log_interval is {self.log_interval}; use at least 1, or monitor.console=false for silence."
            )
        refuse_overlap(self.memory_steps, self.profile_steps)

    @property
    def memory_steps(self) -> MemoryConfig | None:
        """`memory`, whether it was given in its short form or whole."""
        given = self.memory
        return MemoryConfig(steps=given) if isinstance(given, int | str) else given

    @property
    def profile_steps(self) -> ProfileConfig | None:
        """`profile`, likewise."""
        given = self.profile
        return ProfileConfig(steps=given) if isinstance(given, int | str) else given

    @property
    def each_alert(self) -> tuple[Alert, ...]:
        """All of them in their long form."""
        lines = (self.alerts,) if isinstance(self.alerts, str) else self.alerts
        return tuple(Alert(when=line) if isinstance(line, str) else line for line in lines)

    def without_secrets(self) -> MonitorConfig:
        """As a run may write it down: the path of a webhook often is its password."""
        alerts = self.alerts
        if not isinstance(alerts, str):
            alerts = tuple(alert.without_secrets() if isinstance(alert, Alert) else alert for alert in alerts)
        mlflow = MlflowConfig(uri=self.mlflow) if isinstance(self.mlflow, str) else self.mlflow
        return replace(self, alerts=alerts, mlflow=mlflow and mlflow.without_secrets())


def observers_for(config: MonitorConfig, folder: RunFolder | None, is_main: bool) -> list[Observer]:
    """Those that `config` asks for; none on ranks other than the first, and no files where there is no folder.

    An observer whose library is missing is left out with one warning that names the extra.
    """
    if not is_main:
        return []
    makers: list[Callable[[], Observer]] = []
    if config.console:
        makers.append(lambda: Console(log_interval=config.log_interval))
    if folder is not None:
        files = folder
        makers.append(lambda: Samples(files.samples))
        if config.jsonl:
            makers.append(lambda: JsonLines(files.metrics))
        if config.csv:
            makers.append(lambda: CsvTable(files.csv))
        if config.tensorboard:
            makers.append(lambda: TensorBoard(files.tensorboard, every=config.log_interval))
        if config.curve:
            makers.append(lambda: LossCurve(files.curve, history=files.metrics))
        makers += _services(config, folder)
    if (prometheus := config.prometheus) is not None:
        makers.append(lambda: Prometheus(prometheus))
    # Last: what they tell comes after what they tell it of. A function is called on its own, and fails alone.
    functions = [alert for alert in config.each_alert if alert.condition is None]
    lines = [alert for alert in config.each_alert if alert.condition is not None]
    makers += [partial(Alerts, *lines)] * bool(lines) + [partial(Alerts, function) for function in functions]
    observers, missing = [], []
    for make in makers:
        try:
            observers.append(make())
        except DependencyError as exc:
            missing.append(str(exc))
    if missing:
        logger.warning("%s The run goes on without.", " ".join(missing))
    return observers


def _services(config: MonitorConfig, folder: RunFolder) -> list[Callable[[], Observer]]:
    """Those to which a run is sent, under the name of its folder."""
    makers: list[Callable[[], Observer]] = []
    if config.wandb is not None:
        makers.append(partial(WandB, config.wandb, folder=folder.path, every=config.log_interval))
    if config.mlflow is not None:
        makers.append(partial(Mlflow, config.mlflow, folder=folder.path, every=config.log_interval))
    return makers


def system_numbers(
    config: MonitorConfig, folder: str | Path, *, device: str, is_first_of_host: bool
) -> Callable[[], dict[str, float]] | None:
    """What a rank reports of its machine: the first of a host all, the others what is theirs. None: nothing."""
    if not config.system:
        return None
    sampler = SystemSampler(folder, device=device)
    return sampler.numbers if is_first_of_host else sampler.numbers_of_a_rank
