"""A run in one value, read from its folder: what the rules look at. Torn files and old ones give what they have."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from trainfleet.errors import CheckpointError, ConfigError, StoreError
from trainfleet.monitor.history import Standing, is_run, standing
from trainfleet.monitor.run_folder import RunFolder
from trainfleet.store import holder

Row = Mapping[str, Any]
"""A line of metrics.jsonl."""

_DEGREES = ("zero", "dp_replicate", "dp_shard", "tp", "cp", "pp")
MOST_STEPS = 20_000
"""That are held in memory, 2 kB each; of a longer run some are taken by lot."""
MOST_ROWS = 2_000
"""Of the newest reports of ranks, and of anomalies."""
SILENT_SECONDS = 120.0
"""A run whose folder nobody holds, and that said nothing for so long, is dead; on another host holds cannot be seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """A checkpoint that stands in the run's folder."""

    step: int
    num_bytes: int | None = None
    problem: str | None = None
    """Why it cannot be used, as far as that shows without reading all of it."""


@dataclass(frozen=True, kw_only=True)  # without slots, so that sums over all steps are made once
class Summary:
    """What is known of a run."""

    folder: Path
    recipe: Row = field(default_factory=dict)
    planned: int | None = None
    """Steps of the whole run."""
    world_size: int = 1
    device: str = "cpu"
    capacity_bytes: int | None = None
    """Memory that one rank may take: of its GPU, or its share of the host."""
    starts: int = 1
    one_of: int = 1
    """Of a long run one of so many steps is looked at, by lot."""
    steps: Sequence[Row] = ()
    """StepEnded of the steps that stand, in order."""
    undone: Sequence[Row] = ()
    """StepEnded of steps that were taken, lost, and had to be taken again."""
    warm: Sequence[Row] = ()
    """Of `steps` those that were not the first after a start."""
    evaluations: Sequence[Row] = ()
    saves: Sequence[Row] = ()
    failed_saves: Sequence[Row] = ()
    anomalies: Sequence[Row] = ()
    reports: Sequence[Row] = ()
    """RanksReported."""
    skipped_samples: int = 0
    ended: Row | None = None
    """RunEnded of the last start."""
    is_alive: bool = False
    heard_at: float = 0.0
    """When the last line was written, in seconds since 1970."""
    failure: str = ""
    """The last failure report, as text."""
    checkpoints: Sequence[Kept] = ()
    free_bytes: int | None = None
    """Of the disk."""

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of `section.name` in the resolved recipe."""
        value: Any = self.recipe
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return default if value is None else value

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @cached_property
    def step_seconds(self) -> float:
        """Of a usual step: the median, without what lies between steps."""
        return statistics.median(row["seconds"] for row in self.warm) if self.warm else math.nan

    @cached_property
    def whole_seconds(self) -> float:
        """Of all warm steps with what lies between them."""
        return sum(self.phases.values())

    @cached_property
    def phases(self) -> dict[str, float]:
        """Seconds by phase of `stopwatch.PHASES`. A run that knew none has data, evaluation, checkpoint, computing."""
        phases: Counter[str] = Counter()
        for row in self.warm:
            phases.update(row.get("phases") or _old_phases(row))
        if self.warm and not any(row.get("phases") for row in self.warm):
            first = self.warm[0]["step"]
            for phase, rows in (("evaluation", self.evaluations), ("checkpoint", self.saves)):
                seconds = sum(row.get("seconds", 0.0) for row in rows if row["step"] >= first)
                phases[phase] += seconds / self.one_of  # as these are all of them
        return {phase: seconds for phase, seconds in phases.items() if seconds > 0}

    def share(self, *phases: str) -> float:
        """Of the run's time."""
        return sum(self.phases.get(phase, 0.0) for phase in phases) / (self.whole_seconds or 1.0)

    def waits(self) -> dict[str, float]:
        """Seconds by what batches were waited for."""
        waits: Counter[str] = Counter()
        for row in self.warm:
            waits.update(row.get("waits") or {})
        return dict(waits)

    def batch(self) -> tuple[int, int]:
        """(micro-batch, accumulation), or (0, 1) where the recipe does not tell."""
        from trainfleet.data import BatchConfig
        from trainfleet.plan import Plan

        known = {name: self.setting(f"batch.{name}") for name in ("global_batch", "micro_batch", "accumulation")}
        degrees = {
            name: self.setting(f"plan.{name}") for name in ("zero", "dp_replicate", "dp_shard", "tp", "cp", "pp")
        }
        try:
            ranks = Plan(**{name: value for name, value in degrees.items() if value}).data_ranks(self.world_size)
            micro, accumulation, _ = BatchConfig(**known).resolve(ranks)
        except (ConfigError, TypeError):
            return 0, 1
        return micro, accumulation


def _old_phases(row: Row) -> dict[str, float]:
    data = min(row["seconds"], sum((row.get("waits") or {}).values()) or row.get("data_seconds", 0.0))
    return {"data": data, "computing": row["seconds"] - data}


def summarize(folder: Path, *, now: float | None = None) -> Summary:
    """Read a run's folder; ConfigError where there is none. `now` is in seconds since 1970."""
    if not folder.is_dir() or not is_run(folder):
        raise ConfigError(
            f"{folder} is no folder of a run: there is no metrics.jsonl or recipe.yaml in it.",
            hint="Name the `folder` of the recipe, such as runs/gpt; another host is HOST:PORT.",
        )
    files = RunFolder(folder)
    found = standing(files.metrics) if files.metrics.exists() else None
    one_of = -(-found.num_steps // MOST_STEPS) if found else 1
    read = _Reading(found, one_of=max(1, one_of))
    environment = _last_environment(files.environment)
    world_size = int(read.start.get("world_size") or environment.get("world_size") or 1)
    device = str(environment.get("device", "cpu"))
    recipe = read.start.get("recipe") or _yaml(files.recipe)
    quiet_for = (time.time() if now is None else now) - read.heard_at
    usual = statistics.median(row["seconds"] for row in read.steps) if read.steps else 0.0
    return Summary(
        folder=folder,
        recipe=recipe,
        planned=read.start.get("steps"),
        world_size=world_size,
        device=device,
        capacity_bytes=_capacity(environment, read.reports, device),
        starts=max(1, read.num_starts),
        one_of=read.one_of,
        steps=read.steps,
        undone=read.undone,
        warm=read.warm(),
        evaluations=read.evaluations,
        saves=read.saves,
        failed_saves=read.failed_saves,
        anomalies=tuple(read.anomalies),
        reports=tuple(read.reports),
        skipped_samples=read.skipped_samples,
        ended=read.ended,
        is_alive=read.ended is None and (holder(folder) is not None or quiet_for < max(SILENT_SECONDS, 20 * usual)),
        heard_at=read.heard_at,
        failure=_text(folder / "failure.txt"),
        checkpoints=_checkpoints(str(recipe.get("checkpoint", {}).get("folder") or folder)),
        free_bytes=shutil.disk_usage(folder).free,
    )


class _Reading:
    """The rows of metrics.jsonl, sorted; steps that a restart or a rollback undid are set apart."""

    def __init__(self, found: Standing | None, *, one_of: int) -> None:
        self.one_of = one_of
        self.start: Row = {}
        self.num_starts = 0
        self.steps: list[Row] = []
        self.undone: list[Row] = []
        self.evaluations: list[Row] = []
        self.saves: list[Row] = []
        self.failed_saves: list[Row] = []
        self.anomalies: deque[Row] = deque(maxlen=MOST_ROWS)
        self.reports: deque[Row] = deque(maxlen=MOST_ROWS)
        self.skipped_samples = 0
        self.ended: Row | None = None
        self.heard_at = 0.0
        self._firsts: set[int] = set()
        self._starting = True
        self._sorted: dict[str, list[Row] | deque[Row]] = {
            "Evaluated": self.evaluations,
            "CheckpointSaved": self.saves,
            "CheckpointFailed": self.failed_saves,
            "AnomalySeen": self.anomalies,
            "RanksReported": self.reports,
        }
        last: Row = {}
        for row, stands in found.rows() if found else ():
            try:
                self._add(row, stands)
            except (KeyError, TypeError, ValueError):  # torn, or of a version that lacks what this one needs
                continue
            last = row if stands and row["event"] == "StepEnded" else last
        if last and (not self.steps or self.steps[-1] is not last):
            self.steps.append(last)  # whatever the lot said

    def _add(self, row: Row, stands: bool) -> None:
        kind = row["event"]
        self.heard_at = max(self.heard_at, float(row.get("time", 0.0)))
        if kind == "RunStarted":
            self.start, self.ended, self._starting = row, None, True
            self.num_starts += 1
        elif kind == "StepEnded":
            step, _, loss = int(row["step"]), float(row["seconds"]), float(row["loss"])
            if self._starting and stands:
                self._firsts.add(step)
                self._starting = False
            # Not each so manyeth: evaluations come at such, and would count for all or for none.
            if self.one_of == 1 or step * 2_654_435_761 % 2**32 < 2**32 // self.one_of or not math.isfinite(loss):
                (self.steps if stands else self.undone).append(row)
        elif kind == "SamplesSkipped":
            self.skipped_samples = max(self.skipped_samples, int(row["count"]))
        elif kind == "RunEnded" and not row.get("lost_peer"):
            self.ended = row
        elif kind in self._sorted and (stands or kind == "AnomalySeen"):
            int(row["step"])
            self._sorted[kind].append(row)

    def warm(self) -> list[Row]:
        return [row for row in self.steps if row["step"] not in self._firsts]


def _last_environment(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text())
        return dict(entries[-1])
    except (OSError, ValueError, TypeError, IndexError, KeyError):
        return {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:20_000]
    except OSError:
        return ""


def _capacity(environment: Row, reports: Sequence[Row], device: str) -> int | None:
    """Of a GPU, where its rank's report tells; of the host, divided by the ranks that share it."""
    ranks = reports[-1]["ranks"] if reports else []
    if device.startswith("cuda"):
        totals = [
            value
            for rank in ranks
            for name, value in (rank.get("system") or {}).items()
            if "gpu" in name and "memory" in name and "total" in name
        ]
        return int(min(totals)) if totals else None
    memory = environment.get("memory_bytes")
    if not memory:
        return None
    hosts = len({rank.get("host") for rank in ranks}) or 1
    return int(memory) // max(1, math.ceil(int(environment.get("world_size") or 1) / hosts))


def _checkpoints(place: str) -> list[Kept]:
    from trainfleet.checkpoint.catalog import catalog, open_place

    try:
        entries = catalog(open_place(place)[0])
    except (CheckpointError, StoreError, ConfigError):
        return []
    return [Kept(step=entry.step, num_bytes=entry.num_bytes, problem=entry.problem) for entry in entries]
