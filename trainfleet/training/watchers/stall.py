"""Stall: a step that does not end is told while it hangs: in which phase, at which line, on which rank.

Ranks wait for their peers until train.timeout_seconds; nobody waits for a disk that does not answer, a lock, or a
data source. A thread of each rank looks now and then how long ago the loop was heard of. It knows the phase by the
Stopwatch and the line by the frames of the loop's thread, so it needs no help from the loop.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trainfleet.batch import Batch
from trainfleet.comm.environment import RankEnvironment
from trainfleet.errors import Stalled
from trainfleet.events import StepEnded
from trainfleet.monitor.anomalies import AnomalyConfig, Finding
from trainfleet.stopwatch import Stopwatch, running
from trainfleet.training.ranks.failure import MEND, Failure, leave_report, line_of, tell_launcher
from trainfleet.training.watchers.watcher import Watcher

if TYPE_CHECKING:
    from trainfleet.parallel import Engine

logger = logging.getLogger(__name__)

EXCUSED = ("evaluation", "checkpoint")
"""Phases that take as long as they take: a save has a deadline of its own."""
COMPILERS = ("/torch/_dynamo/", "/torch/_inductor/", "/torch/_functorch/", "/triton/")
"""Code whose presence in the stack says that something is compiled."""
PEERS = ("/torch/distributed/", "/trainfleet/comm/")
"""And here that peers are waited for."""
ENOUGH = 5
"""Steps that make a usual."""
FIRST = 10.0
"""Times the floor: what the steps before that may take, for then nobody knows what is usual."""
REMEMBERED = 50


class Stall(NamedTuple):
    """What was seen of one."""

    phase: str
    line: str
    waits_for_peers: bool


class Stalls(Watcher):
    """Has a thread. It sleeps a quarter of what counts as a stall, and ends with the loop. A forked child has none."""

    def __init__(
        self, add: Callable[[Finding], None], config: AnomalyConfig, *, rank: int, folder: Path | None
    ) -> None:
        self._add, self._config, self._rank, self._folder = add, config, rank, folder
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._usual: float | None = None
        self._limit = FIRST * config.stall_floor_seconds
        self._step = 0
        self._since = time.monotonic()
        """When the loop was last heard of; also moved on while it is excused."""
        self._stall: Stall | None = None
        """Of the step under way."""
        self._closed = threading.Event()
        self._loop: int | None = None
        self._watch: Stopwatch | None = None
        self._pid = 0
        self._thread: threading.Thread | None = None

    # in the thread of the loop

    def start(self, engine: Engine) -> None:
        self._loop, self._watch, self._pid = threading.get_ident(), running(), os.getpid()
        self._since = time.monotonic()
        self._closed.clear()
        self._thread = threading.Thread(target=self._guard, name="trainfleet-stalls", daemon=True)
        self._thread.start()

    def begin(self, step: int, micro_batches: Sequence[Batch]) -> None:
        # A step that was rolled back had no end.
        self._step, self._since = step, time.monotonic()

    def end(self, ended: StepEnded) -> None:
        now = time.monotonic()
        stall, self._stall = self._stall, None
        self._step, self._since = ended.step, now
        if stall is not None:
            what = f"Step {ended.step} took {ended.seconds:.1f} s, {self._words(stall)}"
            rank = None if stall.waits_for_peers else self._rank
            self._add(Finding(kind="stalled_step", what=what, rank=rank, lasts=False))
            return
        self._seconds.append(ended.seconds)
        if len(self._seconds) >= ENOUGH and (self._usual is None or ended.step % REMEMBERED == 0):
            self._usual = statistics.median(self._seconds)
            self._limit = max(self._config.stall_floor_seconds, self._config.stall_factor * self._usual)

    def close(self) -> None:
        if self._thread is not None and self._pid == os.getpid():
            self._closed.set()
            self._thread.join()
        self._thread = None

    # in a thread of its own

    def _guard(self) -> None:
        while not self._closed.wait(self._limit / 4):
            self._look()

    def _look(self) -> None:
        since, now = self._since, time.monotonic()
        if now - since < self._limit:
            return
        frames = self._frames()
        if self._phase in EXCUSED or any(part in frame.filename for frame in frames for part in COMPILERS):
            self._since = now
            return
        if self._stall is None:
            peers = self._phase == "communication" or any(part in frame.filename for frame in frames for part in PEERS)
            stall = Stall(self._phase, line_of(frames), peers)
            if since == self._since:  # else the loop has gone on meanwhile
                self._stall = stall
                usual = "" if self._usual is None else f", where {self._usual:.3g} s are usual"
                logger.warning(
                    "Nothing was heard of step %d for %.0f s%s: rank %d %s.",
                    self._step,
                    now - since,
                    usual,
                    self._rank,
                    self._words(stall),
                )
        if self._config.stalled_step == "stop" and now - since >= self._config.stall_stop_seconds:
            self._end_process(now - since, frames)

    def _words(self, stall: Stall) -> str:
        hangs = "waited for other ranks" if stall.waits_for_peers else "hung"
        return f"{hangs} in {stall.phase}, at {stall.line}"

    @property
    def _phase(self) -> str:
        return self._watch.phase if self._watch is not None else "other"

    def _frames(self) -> list[traceback.FrameSummary]:
        """Of the loop's thread, from the loop inwards."""
        frame = sys._current_frames().get(self._loop or 0)
        frames = list(traceback.extract_stack(frame)) if frame is not None else []
        loops = [i for i, each in enumerate(frames) if each.filename.endswith("/trainfleet/training/trainer.py")]
        return frames[loops[0] :] if loops else frames

    def _end_process(self, seconds: float, frames: list[traceback.FrameSummary]) -> None:
        """The loop cannot be reached, so nothing is saved or closed: what is on disk is the last checkpoint."""
        assert self._stall is not None
        environment = RankEnvironment.from_env()
        failure = Failure(
            rank=environment.rank,
            world_size=environment.world_size,
            host=socket.gethostname(),
            time=time.time(),
            sentence=f"did not end step {self._step} for {seconds:.0f} s: it {self._words(self._stall)}.",
            exit_code=Stalled.exit_code,
            hint=MEND,
            traceback="".join(traceback.format_list(frames)),
            step=self._step - 1,
            consequence=self._stall.waits_for_peers,
        )
        if not tell_launcher(failure, environment):
            logger.error("%s %s", failure.error(), MEND)
            if self._folder is not None:
                leave_report(self._folder, failure.error())
        os._exit(Stalled.exit_code)
