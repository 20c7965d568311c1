"""Which observers a run has."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trainfleet.errors import ConfigError, DependencyError
from trainfleet.events import Observer
from trainfleet.monitor.anomalies import AnomalyConfig
from trainfleet.monitor.console import Console
from trainfleet.monitor.csv_table import CsvTable
from trainfleet.monitor.curve import LossCurve
from trainfleet.monitor.jsonl import JsonLines
from trainfleet.monitor.run_folder import RunFolder
from trainfleet.monitor.samples import Samples
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

    mfu: bool = True
    """Model FLOPs utilisation: the share of the devices' peak that the model makes use of. Known from step log_interval
    on, when the model runs once more, on tensors without numbers. Switch it off where its forward must not."""
    flops_per_token: float | None = None
    """FLOPs of forward and backward for one token; null: counted. Give it where custom operators escape the count."""
    peak_flops: float | None = None
    """Peak FLOP/s of one device; null: by the data sheet of the GPU, or measured on a processor."""
    anomalies: AnomalyConfig = field(default_factory=AnomalyConfig)

    def __post_init__(self) -> None:
        for name in ("flops_per_token", "peak_flops"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"monitor.{name} is {value}; it is a positive number, or null to have it found.")
        if self.log_interval < 1:
            raise ConfigError(
                f"monitor.log_interval is {self.log_interval}; use at least 1, or monitor.console=false for silence."
            )


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
    observers, missing = [], []
    for make in makers:
        try:
            observers.append(make())
        except DependencyError as exc:
            missing.append(str(exc))
    if missing:
        logger.warning("%s The run goes on without.", " ".join(missing))
    return observers
