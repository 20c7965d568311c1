"""A run as an endpoint that Prometheus scrapes: `http://127.0.0.1:9464/metrics`."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

from trainfleet.deps import require
from trainfleet.errors import ConfigError
from trainfleet.events import (
    AlertFired,
    AnomalySeen,
    CheckpointFailed,
    CheckpointSaved,
    Evaluated,
    Event,
    RanksReported,
    RunEnded,
    RunStarted,
    StepEnded,
    Tracked,
)
from trainfleet.plan import STRICT

logger = logging.getLogger(__name__)

MOST_NAMES = 1_000
"""Series of one metric; more than that, and a database suffers. Those beyond are left out and counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrometheusConfig:
    """Where the first rank can be scraped."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    port: int = 9464
    """0: a free one, which the log tells."""
    host: str = "127.0.0.1"
    """The address that listens. Anybody who reaches it can read the numbers: 0.0.0.0 only in a network you trust."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"monitor.prometheus.port is {self.port}; use 1 to 65535, or 0 for a free one.")


class Prometheus:
    """Serves the newest numbers from RunStarted until `close`. A port that is taken is a warning, and the run goes on.

    Seconds, bytes and ratios, counters that end in `_total`; what is tracked is `trainfleet_tracked{name="..."}`.
    """

    in_loop = True

    def __init__(self, config: PrometheusConfig | int) -> None:
        self._library = require("prometheus_client", "prometheus", purpose="Prometheus")
        self.config = PrometheusConfig(port=config) if isinstance(config, int) else config
        self.address: tuple[str, int] | None = None
        """Where it listens."""
        self._registry = self._library.CollectorRegistry()
        self._metrics: dict[str, Any] = {}
        self._series: dict[str, set[tuple[str, ...]]] = {}
        self._left_out = 0
        self._server: Any = None
        self._is_open = False

    def on_event(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._open()
            self._gauge("run_steps", "Steps the run will have taken.", event.steps)
            self._gauge("world_size", "Ranks of the run.", event.world_size)
            self._gauge("model_parameters", "Parameters of the model.", event.parameters)
            self._gauge("run_info", "Folder and plan of the run.", 1, folder=event.folder or "", plan=event.plan)
        elif isinstance(event, StepEnded):
            self._step(event)
        elif isinstance(event, Evaluated):
            for name, value in {"loss": event.loss, **event.metrics}.items():
                self._gauge("validation", "The last evaluation, by metric.", value, metric=name)
        elif isinstance(event, Tracked):
            self._gauge("tracked", "Numbers that the run tracks, by name.", event.value, name=event.name)
        elif isinstance(event, RanksReported):
            self._ranks(event)
        elif isinstance(event, CheckpointSaved | CheckpointFailed):
            failed = isinstance(event, CheckpointFailed)
            self._count("checkpoints", "Checkpoints, by how they ended.", 1, ended="failed" if failed else "saved")
        elif isinstance(event, AlertFired):
            self._count("alerts", "Alerts that fired, by their condition.", 1, alert=event.alert)
        elif isinstance(event, AnomalySeen):
            self._count(
                "anomalies", "Anomalies seen, by kind and what was done.", 1, kind=event.kind, policy=event.policy
            )
        elif isinstance(event, RunEnded):
            self._gauge("run_ended", "1 once the run has ended.", 1)

    def _step(self, event: StepEnded) -> None:
        self._gauge("step", "Optimizer steps taken.", event.step)
        self._gauge("loss", "Loss of the last step, of all ranks.", event.loss)
        self._gauge("learning_rate", "Learning rate of the last step.", event.learning_rate)
        self._gauge("memory_bytes", "Resident memory of the first rank, or peak of its GPU.", event.memory_bytes)
        for name, value in (("grad_norm", event.grad_norm), ("mfu_ratio", event.mfu), ("loss_scale", event.loss_scale)):
            if value is not None:
                self._gauge(name, f"{name} of the last step.", value)
        self._count("samples", "Samples of all ranks.", event.samples)
        self._count("tokens", "Tokens of all ranks.", event.tokens)
        self._count("steps", "Steps of this process.", 1)
        self._count("step_seconds", "Seconds in steps.", event.seconds)
        self._count("skipped_steps", "Steps whose update was skipped.", int(event.skipped))
        for phase, seconds in event.phases.items():
            self._count("phase_seconds", "Seconds by phase, of steps and between them.", seconds, phase=phase)

    def _ranks(self, event: RanksReported) -> None:
        for rank, each in enumerate(event.ranks):
            for name, value in each.get("system", {}).items():
                labels = {"host": str(each.get("host", "")), "rank": str(rank)}
                *families, name = name.split("/")
                if families:  # network/eth0/…, gpu/0/…
                    labels["device"] = "/".join(families[1:])
                if name.endswith("_percent"):
                    name, value = name.removesuffix("_percent") + "_ratio", value / 100
                family = "_".join([*families[:1], name])
                self._gauge(f"system_{family}", f"{family} of a host or a rank.", value, **labels)

    def close(self) -> None:
        """Give the port back; may be called twice."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        if self._left_out:
            logger.warning("Prometheus: %d numbers were left out.", self._left_out)
            self._left_out = 0

    def _open(self) -> None:
        if self._is_open:
            return
        self._is_open = True
        try:
            self._server, _ = self._library.start_http_server(
                self.config.port, addr=self.config.host, registry=self._registry
            )
        except OSError as exc:
            logger.warning(
                "Prometheus cannot be served at %s:%d: %s. The run goes on without; choose another monitor.prometheus.",
                self.config.host,
                self.config.port,
                exc.strerror or exc,
            )
            return
        _let_go_in_children()
        _servers.add(self._server)
        self.address = self._server.server_address[:2]
        logger.info("Prometheus can read this run at http://%s:%d/metrics.", *self.address)

    def _gauge(self, name: str, meaning: str, value: Any, /, **labels: str) -> None:
        if (metric := self._find(self._library.Gauge, name, meaning, labels)) is not None:
            with contextlib.suppress(TypeError, ValueError):  # it is no number
                metric.set(float(value))

    def _count(self, name: str, meaning: str, more: float, /, **labels: str) -> None:
        if (metric := self._find(self._library.Counter, name, meaning, labels)) is not None:
            metric.inc(max(0.0, more))

    def _find(self, kind: Any, name: str, meaning: str, labels: dict[str, str]) -> Any:
        """The series with these labels; None where there are too many of its name."""
        name = re.sub(r"[^a-zA-Z0-9_]", "_", f"trainfleet_{name}")
        values = tuple(labels.values())
        series = self._series.setdefault(name, set())
        if values not in series:
            if len(series) >= MOST_NAMES:
                if not self._left_out:
                    logger.warning("Prometheus: %s has %d series; others are left out and counted.", name, MOST_NAMES)
                self._left_out += 1
                return None
            series.add(values)
        if name not in self._metrics:
            self._metrics[name] = kind(name, meaning, tuple(labels), registry=self._registry)
        metric = self._metrics[name]
        return metric.labels(*values) if labels else metric


_servers: weakref.WeakSet[Any] = weakref.WeakSet()


@functools.cache
def _let_go_in_children() -> None:
    """A forked process, such as a worker that loads data, must not hold the port when this process is killed."""

    def let_go() -> None:
        for server in list(_servers):
            with contextlib.suppress(OSError):
                server.socket.close()

    os.register_at_fork(after_in_child=let_go)
