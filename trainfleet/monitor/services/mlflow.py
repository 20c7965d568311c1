"""A run in MLflow: sent from a thread of its own, and going on as the same run there after a resume."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from trainfleet.deps import installed, require
from trainfleet.events import AlertFired, AnomalySeen, Event, Noted, RunEnded, RunStarted
from trainfleet.monitor.outbox import Outbox
from trainfleet.monitor.scalars import scalars_in
from trainfleet.plan import STRICT

CLOSE_SECONDS = 30.0
"""For what is still to be sent when the run has ended."""
MOST_METRICS, MOST_PARAMETERS, MOST_LETTERS = 1000, 100, 6000
"""Of one request, and of a parameter's value: what a server of MLflow takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlflowConfig:
    """Where the run goes in MLflow; what is not set here, its own variables say."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    uri: str | None = None
    """Of a tracking server (http…) or a store (sqlite:///…, a folder). null: MLFLOW_TRACKING_URI, or its default."""
    experiment: str = "trainfleet"
    """In which the run is; made if there is none of that name."""
    name: str | None = None
    """Of the run. null: the name of the run folder."""

    def without_secrets(self) -> MlflowConfig:
        """As a run may write it down: without a user and password before the host."""
        return self if self.uri is None else replace(self, uri=re.sub(r"//[^/@]*@", "//", self.uri))


class Mlflow:
    """Numbers of each `every`-th step, evaluations and tracked numbers as metrics, the recipe as parameters.

    The id of the run there is kept in `folder`/mlflow/run_id.
    """

    in_loop = True

    def __init__(self, config: MlflowConfig | str, *, folder: str | Path, every: int = 1) -> None:
        if installed("mlflow") is None:  # importing it takes a second, which the thread has
            require("mlflow", "mlflow", purpose="MLflow")
        self.config = MlflowConfig(uri=config) if isinstance(config, str) else config
        self._folder = Path(folder)
        self._every = every
        self._client: Any = None
        self._run = ""
        self._outbox: Outbox[tuple[int, Event]] = Outbox("MLflow", self._deliver)

    def on_event(self, event: Event) -> None:
        if isinstance(event, RunStarted | RunEnded | Noted | AlertFired | AnomalySeen) or scalars_in(
            event, every=self._every
        ):
            self._outbox.put((int(time.time() * 1000), event))

    def close(self) -> None:
        self._outbox.close(CLOSE_SECONDS)

    # in the thread

    def _deliver(self, events: Sequence[tuple[int, Event]]) -> None:
        entities: Any = None
        metrics: list[Any] = []
        for at, event in events:
            if isinstance(event, RunStarted) and not self._run:
                self._start(event)
            if not self._run:
                raise RuntimeError("the run has not begun there")
            entities = entities or require("mlflow.entities", "mlflow")
            if (scalars := scalars_in(event, every=self._every)) is not None:
                step, numbers = scalars
                metrics += [entities.Metric(_name(name), float(value), at, step) for name, value in numbers.items()]
                continue
            self._send(metrics)
            metrics = []
            self._tell(event)
        self._send(metrics)

    def _send(self, metrics: Sequence[Any]) -> None:
        for first in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._run, metrics=metrics[first : first + MOST_METRICS])

    def _tell(self, event: Event) -> None:
        if isinstance(event, RunEnded):
            for name, value in event.summary.items():
                self._client.set_tag(self._run, _name(f"summary/{name}"), str(value)[:MOST_LETTERS])
            finished = event.reason in ("finished", "stopped early")
            self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED")
            self._run = ""
        elif isinstance(event, AlertFired):
            self._client.set_tag(self._run, "alert", f"step {event.step}: {event.text or event.alert}"[:MOST_LETTERS])
        elif isinstance(event, AnomalySeen):
            self._client.set_tag(self._run, f"anomaly/{event.kind}", f"step {event.step}: {event.what}"[:MOST_LETTERS])
        elif isinstance(event, Noted):
            self._client.set_tag(self._run, _name(event.title), event.text[:MOST_LETTERS])

    def _start(self, event: RunStarted) -> None:
        tracking, entities = require("mlflow.tracking", "mlflow"), require("mlflow.entities", "mlflow")
        self._client = client = tracking.MlflowClient(tracking_uri=self.config.uri)
        path = self._folder / "mlflow" / "run_id"
        if (kept := self._kept(path)) is not None:
            client.update_run(kept, status="RUNNING")
            self._run = kept
            return
        experiment = client.get_experiment_by_name(self.config.experiment)
        experiment_id = (
            client.create_experiment(self.config.experiment) if experiment is None else experiment.experiment_id
        )
        run = client.create_run(experiment_id, run_name=self.config.name or self._folder.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run.info.run_id + "\n")
        self._run = run.info.run_id
        values = {"plan": event.plan, "parameters": event.parameters, "world_size": event.world_size}
        parameters = [
            entities.Param(_name(name), value[:MOST_LETTERS]) for name, value in _leaves({**values, **event.recipe})
        ]
        for first in range(0, len(parameters), MOST_PARAMETERS):
            client.log_batch(self._run, params=parameters[first : first + MOST_PARAMETERS])

    def _kept(self, path: Path) -> str | None:
        """The run of this folder, where the server still has it."""
        try:
            kept = path.read_text().strip()
        except OSError:
            return None
        exceptions: Any = require("mlflow.exceptions", "mlflow")
        try:
            self._client.get_run(kept)
        except exceptions.MlflowException as exc:
            if getattr(exc, "error_code", "") not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None
        return kept


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        elif value not in (None, "", (), [], {}) and not (isinstance(value, float) and math.isnan(value)):
            yield f"{prefix}{name}", str(value)


def _name(name: str) -> str:
    """As MLflow takes it: letters, digits and `_ - . / :` and spaces, at most 250."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-./: ") else "_" for c in name)[:250].strip("/") or "_"
