"""Ranks are copies of a process that has imported everything; they hear signals, and die with their launcher."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("torch", reason="ranks need torch")

from trainfleet.training.fork_server import CAN_FORK, IMPORTED

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(not CAN_FORK, reason="the system has no fork server")]

OWN = """
import os, signal, sys, time
from pathlib import Path

def rank(folder, what):
    place = Path(folder)
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    facts = ["torch._dynamo" in sys.modules, os.environ["OMP_NUM_THREADS"], os.getsid(0) == os.getpid()]
    (place / os.environ["RANK"]).write_text(repr(facts))
    if what == "exit":
        return 3 if os.environ["RANK"] == "1" else 0
    while what == "wait" and not heard:
        time.sleep(0.01)
    (place / f"heard-{os.environ['RANK']}").touch()
    return 0
"""

LAUNCHER = """
import sys
from functools import partial
from trainfleet.training.launch import run_elastic
sys.path.insert(0, sys.argv[1])
import own
if __name__ == "__main__":
    sys.exit(run_elastic(partial(own.rank, sys.argv[1], sys.argv[2]), nproc=2))
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    started: list[subprocess.Popen[str]] = []

    def start(what: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(tmp_path / "launcher.py"), str(tmp_path), what]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def below(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """All processes that the launcher has started, once both ranks are there."""
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        found = psutil.Process(launcher.pid).children(recursive=True)
        if sum(process.name().startswith("rank ") for process in found) == 2:
            return found
        time.sleep(0.02)
    raise TimeoutError("the ranks did not come up")


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, 10)[1]


def came(folder: Path, names: str) -> bool:
    ends = time.monotonic() + 60
    while not all((folder / name).exists() for name in names.split()) and time.monotonic() < ends:
        time.sleep(0.02)
    return all((folder / name).exists() for name in names.split())


def test_all_that_is_imported_early_is_there() -> None:
    # The server passes over what it cannot import, and starts would silently become slow.
    assert all(importlib.import_module(name) for name in IMPORTED)


def test_ranks_have_imported_already_and_a_signal_for_all_reaches_them(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    launcher = start("wait")
    processes = below(launcher)
    assert came(tmp_path, "0 1")
    # As SLURM and terminals do: to every process. The server outlives it, and the ranks end by themselves.
    for process in [*processes, launcher]:
        process.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 128 + signal.SIGTERM
    assert came(tmp_path, "heard-0 heard-1") and gone(processes)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["[True, '1', True]"] * 2


def test_ranks_and_server_die_with_a_killed_launcher(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    launcher = start("wait")
    processes = below(launcher)
    assert came(tmp_path, "0 1")
    launcher.kill()
    assert gone(processes)
    assert not (tmp_path / "heard-0").exists()


def test_a_code_that_a_rank_returns_is_a_failure(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    launcher = start("exit")
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 1 and "Rank 1 of 2" in said and "ended with exit code 3" in said
