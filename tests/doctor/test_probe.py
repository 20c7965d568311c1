from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil

from trainfleet.doctor.probe import try_programs

SHORT = timedelta(seconds=1)
LONG = timedelta(seconds=30)


def test_what_was_said_and_how_it_ended_come_back():
    fine, broken = try_programs(["print('hello')"], deadline=LONG) + try_programs(
        ["import sys; print('x'); raise ValueError('no such luck')"], deadline=LONG
    )
    assert (fine.returncode, fine.output, fine.error) == (0, "hello\n", "")
    assert (broken.returncode, broken.output, broken.error) == (1, "x\n", "ValueError: no such luck")


def test_a_late_program_is_killed_with_its_children(tmp_path):
    note = tmp_path / "pid"
    program = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(note)!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    start = time.monotonic()
    (tried,) = try_programs([program], deadline=SHORT)
    assert tried.returncode is None and time.monotonic() - start < 10
    assert gone(int(note.read_text()))


def test_nobody_waits_for_a_peer_that_failed():
    start = time.monotonic()
    waiting, failed = try_programs(["import time; time.sleep(60)", "raise SystemExit(3)"], deadline=LONG)
    assert (waiting.returncode, failed.returncode) == (None, 3)
    assert time.monotonic() - start < 10


def test_a_killed_parent_leaves_no_process(tmp_path: Path):
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = (
        "from datetime import timedelta; from trainfleet.doctor.probe import try_programs\n"
        f"try_programs([{child!r}], deadline=timedelta(seconds=1))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    while not (note.exists() and note.read_text()):
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone(int(note.read_text()))


def gone(pid: int, within: float = 10) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False
