"""A run folder read back: what was trained, how it went, where its time went, how it ended."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainfleet.config.yaml import read_yaml_file
from trainfleet.errors import ConfigError, StoreError
from trainfleet.events import (
    AlertFired,
    AnomalySeen,
    CheckpointFailed,
    CheckpointSaved,
    Evaluated,
    Noted,
    RanksReported,
    RunEnded,
    RunStarted,
    SamplesSkipped,
    StepEnded,
    Tracked,
)
from trainfleet.monitor.history.goodput import Goodput, Ledger, finite
from trainfleet.monitor.history.ranks import Ranks
from trainfleet.monitor.history.standing import standing
from trainfleet.monitor.history.steps import Group, Steps
from trainfleet.monitor.history.thinned import Thinned
from trainfleet.monitor.progress import BASELINE
from trainfleet.monitor.run_folder import RunFolder
from trainfleet.store import holder

MAX_NAMES = 10_000
"""Tracked names that are kept apart; values of further ones are counted."""
MAX_TEXTS = 100
"""Of notes, anomalies and alerts the newest that are kept; all are counted."""


@dataclass(kw_only=True, slots=True)
class Start:
    """A start, or a resume."""

    time: float
    step: int
    """After which it went on; 0 at the beginning."""
    steps: int
    world_size: int
    parameters: int
    plan: str
    ended: str | None = None
    """`finished`, `stopped early`, `interrupted`, or the sentence of an error; None where nothing was said."""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    step: int
    time: float
    loss: float
    metrics: Mapping[str, float]
    seconds: float


@dataclass(kw_only=True, slots=True)
class TrackedNumber:
    """One name's values in the steps that stand."""

    last: float
    step: int
    """Of the last one."""
    num_values: int = 0
    least: float = float("inf")
    most: float = float("-inf")


@dataclass(kw_only=True, slots=True)
class Saves:
    num_saved: int = 0
    num_failed: int = 0
    last_step: int | None = None
    blocked_seconds: float = 0.0
    last_reason: str = ""
    """Of the last one that failed."""


@dataclass(kw_only=True)
class History:
    """A run as it stands; what a rollback or a resume undid is in `goodput` and in the counts of events only."""

    folder: Path
    running: str | None
    """Who holds the folder, in words; None where nobody does."""
    recipe: Mapping[str, Any]
    """Every setting as it was resolved at the last start; empty where it is not known."""
    environments: list[Mapping[str, Any]]
    """One entry a start: versions, machine and command."""
    steps: Steps
    starts: list[Start] = field(default_factory=list)
    evaluations: Thinned[Evaluation] = field(default_factory=Thinned)
    best: Evaluation | None = None
    saves: Saves = field(default_factory=Saves)
    tracked: dict[str, TrackedNumber] = field(default_factory=dict)
    num_left_out: int = 0
    """Values of tracked names beyond MAX_NAMES."""
    baselines: dict[str, float] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Ranks)
    memory: Thinned[tuple[int, tuple[int, ...]]] = field(default_factory=Thinned)
    """(step, bytes by rank) of the ranks' reports."""
    notes: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_TEXTS))
    anomalies: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_TEXTS))
    """Rows of AnomalySeen, also of steps that were undone."""
    anomaly_counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (kind, policy)."""
    alerts: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_TEXTS))
    alert_counts: Counter[str] = field(default_factory=Counter)
    skipped_samples: int = 0
    summary: Mapping[str, Any] = field(default_factory=dict)
    goodput: Goodput = field(default_factory=lambda: Goodput(seconds=0.0, parts={}))
    num_torn: int = 0
    """Lines that could not be read."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last(self) -> Group | None:
        """The last step, or group of steps, that stands."""
        return self.steps.groups[-1] if self.steps.groups else None

    @property
    def last_step(self) -> int:
        return self.last.step if self.last else self.starts[-1].step if self.starts else 0

    @property
    def end(self) -> str:
        """How it ended: `running`, what its last start said, or that nothing was said."""
        if self.running:
            return "running"
        if not self.starts:
            return "not begun"
        return self.starts[-1].ended or "ended without a word"

    def loss_at(self, step: int) -> float:
        """The mean of the finite losses of the last 5 % of the steps up to `step`; NaN where there are none."""
        reach = max(1, step // 20)
        total, weight = 0.0, 0
        for group in self.steps.groups:
            known = group.num_steps - group.not_finite
            if step - reach < group.step <= step and known > 0:
                total, weight = total + group.loss * known, weight + known
        return total / weight if weight else float("nan")

    def step_after(self, seconds: float) -> int:
        """The last step that was taken within so many seconds of training: time in steps that stand."""
        step = 0
        for group in self.steps.groups:
            seconds -= group.seconds
            if seconds < -1e-9:
                break
            step = group.step
        return step


def is_run(folder: Path) -> bool:
    """Whether a run was written there."""
    files = RunFolder(folder)
    return files.metrics.is_file() or files.recipe.is_file()


def read_run(path: str | Path, *, now: float | None = None) -> History:
    """The run in `path`, also one under way; StoreError where there is none, or nothing that can be read.

    Memory does not grow with the length of the run, and the time is about twice that of parsing its lines as JSON
    (`benchmarks/read_run.py`). `now` is a time.time() for the goodput of a run under way.
    """
    files = RunFolder(path)
    if not files.path.is_dir():
        raise StoreError(f"There is no folder {files.path}.", hint=_others_beside(files.path))
    if not is_run(files.path):
        raise StoreError(
            f"{files.path} is no run: it has neither metrics.jsonl nor recipe.yaml.", hint=_others_beside(files.path)
        )
    running = holder(files.path)
    found = standing(files.metrics)
    history = History(
        folder=files.path,
        running=running,
        recipe={},
        environments=_environments(files.environment),
        steps=Steps(found.num_steps),
    )
    ledger = Ledger()
    for row, stands in found.rows():
        if not row:
            history.num_torn += 1
            continue
        try:
            _READERS.get(row["event"], _pass)(history, row, stands)
            ledger.add(row, stands)
        except (KeyError, TypeError, ValueError):  # a line of an event that lacks what it has today
            history.num_torn += 1
    history.goodput = ledger.goodput(history.steps.phases, (now or time.time()) if running else None)
    if files.recipe.is_file():
        history.recipe = _recipe(files.recipe, told=history.recipe)
    return history


def _others_beside(path: Path) -> str | None:
    folder = path if path.is_dir() else path.parent
    found = sorted(each for each in folder.iterdir() if each.is_dir() and is_run(each)) if folder.is_dir() else []
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return f"Runs there: {', '.join(map(str, found[:8]))}{more}." if found else None


def _recipe(path: Path, told: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the file says; what the run told of itself where somebody has spoilt the file."""
    try:
        recipe, _ = read_yaml_file(path)
    except ConfigError:
        if told:
            return told
        raise
    return recipe if isinstance(recipe, Mapping) else told


def _environments(path: Path) -> list[Mapping[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not there, or cut short by hand
        return []
    return [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []


def _started(history: History, row: dict[str, Any], stands: bool) -> None:
    history.starts.append(
        Start(
            time=finite(row.get("time")),
            step=int(row["start_step"]),
            steps=int(row["steps"]),
            world_size=int(row["world_size"]),
            parameters=int(row["parameters"]),
            plan=str(row["plan"]),
        )
    )
    history.steps.begin()
    history.summary = {}
    if isinstance(row.get("recipe"), Mapping):
        history.recipe = row["recipe"]


def _stepped(history: History, row: dict[str, Any], stands: bool) -> None:
    if stands:
        history.steps.add(row)


def _evaluated(history: History, row: dict[str, Any], stands: bool) -> None:
    if not stands:
        return
    metrics = row.get("metrics")
    found = Evaluation(
        step=int(row["step"]),
        time=finite(row.get("time")),
        loss=float(row["loss"]),
        metrics=metrics if isinstance(metrics, Mapping) else {},
        seconds=finite(row.get("seconds")),
    )
    history.evaluations.append(found)
    if history.best is None or found.loss < history.best.loss:
        history.best = found


def _tracked(history: History, row: dict[str, Any], stands: bool) -> None:
    name, value = str(row["name"]), float(row["value"])
    if name.startswith(BASELINE):
        history.baselines[name.removeprefix(BASELINE)] = value
        return
    if not stands:
        return
    if name not in history.tracked and len(history.tracked) >= MAX_NAMES:
        history.num_left_out += 1
        return
    number = history.tracked.setdefault(name, TrackedNumber(last=value, step=0))
    number.last, number.step = value, int(row["step"])
    number.num_values += 1
    number.least, number.most = min(number.least, value), max(number.most, value)


def _saved(history: History, row: dict[str, Any], stands: bool) -> None:
    history.saves.num_saved += 1
    history.saves.last_step = int(row["step"])
    history.saves.blocked_seconds += finite(row.get("seconds"))


def _not_saved(history: History, row: dict[str, Any], stands: bool) -> None:
    history.saves.num_failed += 1
    history.saves.last_reason = str(row.get("reason", ""))


def _ranks_reported(history: History, row: dict[str, Any], stands: bool) -> None:
    if not stands:
        return
    history.ranks.add(row.get("ranks"))
    reports = row.get("ranks")
    if isinstance(reports, list) and reports:
        sizes = tuple(int(finite(each.get("memory_bytes"))) for each in reports if isinstance(each, Mapping))
        history.memory.append((int(row["step"]), sizes))


def _noted(history: History, row: dict[str, Any], stands: bool) -> None:
    history.notes.append(row)


def _anomaly_seen(history: History, row: dict[str, Any], stands: bool) -> None:
    history.anomaly_counts[str(row["kind"]), str(row["policy"])] += 1
    history.anomalies.append(row)


def _alert_fired(history: History, row: dict[str, Any], stands: bool) -> None:
    history.alert_counts[str(row["alert"])] += 1
    history.alerts.append(row)


def _samples_skipped(history: History, row: dict[str, Any], stands: bool) -> None:
    history.skipped_samples = int(row["count"])


def _ended(history: History, row: dict[str, Any], stands: bool) -> None:
    if history.starts:
        history.starts[-1].ended = str(row["reason"])
        history.starts[-1].seconds = finite(row.get("seconds"))
    summary = row.get("summary")
    if isinstance(summary, Mapping):
        history.summary = {name: value for name, value in summary.items() if not name.startswith(BASELINE)}
        for name, value in summary.items():
            if name.startswith(BASELINE) and isinstance(value, (int, float)):
                history.baselines[name.removeprefix(BASELINE)] = float(value)


def _pass(history: History, row: dict[str, Any], stands: bool) -> None:
    """Nothing to keep."""


_READERS = {
    RunStarted.__name__: _started,
    StepEnded.__name__: _stepped,
    Evaluated.__name__: _evaluated,
    Tracked.__name__: _tracked,
    CheckpointSaved.__name__: _saved,
    CheckpointFailed.__name__: _not_saved,
    Noted.__name__: _noted,
    SamplesSkipped.__name__: _samples_skipped,
    RanksReported.__name__: _ranks_reported,
    AnomalySeen.__name__: _anomaly_seen,
    AlertFired.__name__: _alert_fired,
    RunEnded.__name__: _ended,
}
