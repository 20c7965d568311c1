"""ProfileWatch: traces a few steps of a run by torch's profiler, and writes traces, operators and memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from trainfleet.batch import Batch
from trainfleet.comm.group import Group
from trainfleet.errors import DependencyError, StoreError
from trainfleet.events import Event, Noted, RunStarted, StepEnded
from trainfleet.monitor import RunFolder
from trainfleet.monitor.profiling.memory_picture import write_memory_picture
from trainfleet.monitor.profiling.profile import Profile
from trainfleet.monitor.profiling.step_range import ProfileConfig
from trainfleet.parallel import Engine
from trainfleet.stopwatch import timed
from trainfleet.store import replacing
from trainfleet.training.watchers.watcher import Watcher

logger = logging.getLogger(__name__)


class ProfileWatch(Watcher):
    """Outside of the steps of `config`, and the one before them, it does nothing. Each rank writes its own trace."""

    def __init__(self, config: ProfileConfig, folder: RunFolder, group: Group) -> None:
        self._range, self._with_stack = config.range, config.with_stack
        self._folder, self._group = folder, group
        self._is_asked = config.ranks is None or group.rank in config.ranks
        self._engine: Engine | None = None
        self._profile: Profile | None = None
        self._done = False
        self._first, self._last = self._range.first, self._range.last

    def hear(self, event: Event) -> None:
        if not isinstance(event, RunStarted):
            return
        taken, steps = event.start_step, event.steps
        self._first = max(self._range.first, taken + 1)
        self._last = min(self._range.last, steps)
        if self._group.rank == 0 and (taken >= self._range.first or self._first > steps):
            logger.warning(
                "monitor.profile asks for step %s, but %s.", self._range, self._range.what_is_left(taken, steps)
            )

    def start(self, engine: Engine) -> None:
        self._engine = engine

    def begin(self, step: int, micro_batches: Sequence[Batch]) -> None:
        if self._done or self._profile is not None or not self._is_asked:
            return
        if not self._first - 1 <= step <= self._last:
            return
        profile = Profile(
            getattr(self._engine, "model", None),
            getattr(self._engine, "optimizer", None),
            with_stack=self._with_stack,
            step=max(step, self._first) - 1,
            rank=self._group.rank,
        )
        try:
            with timed("observers"):
                profile.start(warm_up=step < self._first)
            self._profile = profile
        except RuntimeError as exc:
            self._done = True
            logger.warning("Step %s is not traced: %s", self._range, exc)

    def end(self, ended: StepEnded) -> None:
        if self._profile is None:
            return
        with timed("observers"):
            self._profile.step()
            if ended.step >= self._last:
                self._finish(ended.step)

    def close(self) -> None:
        """A run that ends within its steps writes those that it took."""
        if self._profile is not None:
            self._finish(None)

    def _finish(self, step: int | None) -> None:
        profile, self._profile, self._done = self._profile, None, True
        assert profile is not None
        begun = time.perf_counter()
        try:
            if not profile.stop():
                return
            self._write(profile)
        except StoreError as exc:
            logger.warning("The profile is not whole: %s The run goes on.", exc)
        except Exception:  # like an observer's, its failure does not stop a run
            logger.warning("The profile could not be made; the run goes on.", exc_info=True)
        else:
            if step is not None and self._group.rank == 0:
                table = (self._folder.profile / "operators.txt").read_text(encoding="utf-8")
                took = f"written in {time.perf_counter() - begun:.1f} s; open a trace in ui.perfetto.dev"
                text = f"{self._folder.profile}/rank_*.json.gz {took}\n" + "\n".join(table.splitlines()[:16])
                self.emit(Noted(step=step, title="profile", text=text))

    def _write(self, profile: Profile) -> None:
        folder, rank = self._folder.profile, self._group.rank
        profile.write(folder / f"rank_{rank}.json.gz")
        if rank == 0:
            with replacing(folder / "operators.txt") as unfinished:
                unfinished.write_text(profile.operators(), encoding="utf-8")
            try:
                write_memory_picture(profile.memory_report(), folder / "memory.png")
            except DependencyError as exc:
                logger.warning("%s The profile is written without it.", exc)
