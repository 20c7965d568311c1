"""How far a rank has come is known after it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from trainfleet.events import Noted
from trainfleet.training.ranks.progress import NAME, Progress, read_progress

KILLED = """
import os, signal, sys
from pathlib import Path
from trainfleet.events import RunStarted, StepEnded
from trainfleet.training.ranks.progress import Progress

progress = Progress(Path(sys.argv[1]))
progress.on_event(RunStarted(folder=None, steps=9, start_step=3, world_size=1, parameters=1, plan=""))
for step in (4, 5):
    progress.on_event(StepEnded(step=step, loss=1.0, learning_rate=0.1, grad_norm=None, samples=1, tokens=1, seconds=1,
                                data_seconds=0))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_rank_leaves_its_step(tmp_path: Path) -> None:
    (tmp_path / "attempt_0" / "1").mkdir(parents=True)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "attempt_0" / "1")], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert read_progress(tmp_path) == (3, 5)


def test_the_furthest_rank_counts_and_none_is_none(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    for rank in "01":
        (tmp_path / rank).mkdir()
        Progress(tmp_path / rank).on_event(Noted(step=1, title="a", text="b"))
    (tmp_path / "1" / NAME).write_bytes(bytes(15) + b"\x01")
    assert read_progress(tmp_path) == (0, 1 << 56)
    (tmp_path / "1" / NAME).write_bytes(b"torn")
    assert read_progress(tmp_path) == (0, 0)
