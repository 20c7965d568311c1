"""A run in TensorBoard, written without torch and without a thread."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trainfleet.deps import require
from trainfleet.events import AlertFired, AnomalySeen, Event, Noted, RunEnded, RunStarted
from trainfleet.monitor.journal import Journal
from trainfleet.monitor.scalars import scalars_in


class TensorBoard:
    """Scalars of each `every`-th step, of evaluations and tracked numbers, and texts, under `folder`.

    Each start writes a file of its own and tells TensorBoard to forget the steps that are taken again.
    """

    in_loop = True

    def __init__(self, folder: str | Path, *, every: int = 1) -> None:
        writer = require("tensorboard.summary.writer.record_writer", "monitor", purpose="Writing for TensorBoard")
        from tensorboard.compat.proto import event_pb2, summary_pb2

        self._event = event_pb2.Event
        self._session = event_pb2.SessionLog
        self._summary = summary_pb2.Summary
        self._record_writer = writer.RecordWriter
        self._every = every
        self._folder = Path(folder)
        self._journal: Journal | None = None

    def on_event(self, event: Event) -> None:
        if (scalars := scalars_in(event, every=self._every)) is not None:
            self._add_scalars(*scalars)
        elif isinstance(event, AlertFired):
            self._add_text(event.step, "alerts", _as_code(f"{event.alert}\n{event.text}"))
        elif isinstance(event, AnomalySeen):
            self._add_text(event.step, f"anomalies/{event.kind}", _as_code(f"{event.what}\n{event.policy}"))
        elif isinstance(event, Noted):
            self._add_text(event.step, event.title, _as_code(event.text))
        elif isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, RunEnded):
            rows = "".join(f"| {name} | {value} |\n" for name, value in event.summary.items())
            self._add_text(event.step, "summary", f"{event.reason}\n\n| | |\n|-|-|\n{rows}")

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def _start(self, event: RunStarted) -> None:
        # START makes TensorBoard drop what earlier files say of this step and later ones.
        start = self._session(status=self._session.START)
        self._append(self._event(wall_time=time.time(), step=event.start_step + 1, session_log=start))
        recipe = yaml.safe_dump(_plain(event.recipe), sort_keys=False, allow_unicode=True)
        self._add_text(
            event.start_step,
            "recipe",
            f"{event.plan}, {event.parameters:,} parameters, world size {event.world_size}\n\n{_as_code(recipe)}",
        )

    def _add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._summary(
            value=[self._summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
        )
        self._append(self._event(wall_time=time.time(), step=step, summary=summary))

    def _add_text(self, step: int, title: str, markdown: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype="DT_STRING", string_val=[markdown.encode()], tensor_shape=shape)
        value = self._summary.Value(tag=f"{title}/text_summary", metadata=metadata, tensor=tensor)
        self._append(self._event(wall_time=time.time(), step=step, summary=self._summary(value=[value])))

    def _append(self, event: Any) -> None:
        if self._journal is None:
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            self._journal = Journal(self._folder / name)
            self._append(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        record = io.BytesIO()
        self._record_writer(record).write(event.SerializeToString())
        self._journal.append(record.getvalue())


def _as_code(text: str) -> str:
    """Markdown that shows the text as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _plain(value: Any) -> Any:
    """What a YAML file can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
