"""The process that ranks are copied from: a copy is its launcher's child, and much as a fresh one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trainfleet.training.ranks import preload

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives a process the children of its children"),
]

# A launcher that asks for a copy in the words of the protocol, and does with it what its argument says.
LAUNCHER = """
import json, os, signal, socket, subprocess, sys
from trainfleet.training.ranks import preload

what, *modules = sys.argv[1:]
preload.prctl(preload.PR_SET_CHILD_SUBREAPER, 1)
control, theirs = socket.socketpair()
words = [sys.executable, "-m", preload.__name__, str(theirs.fileno()), str(os.getpid()), *modules]
process = subprocess.Popen(words, pass_fds=[theirs.fileno()], env={**os.environ, "SECRET": "of the original"})
theirs.close()
if control.recv(5) != preload.READY:
    sys.exit(f"not ready, {process.wait()}")
ours, theirs = socket.socketpair()
socket.send_fds(control, [b"c"], [theirs.fileno()])
theirs.close()
pid = int(ours.makefile().readline())
print(process.pid, pid, flush=True)
if what == "die":
    signal.pause()
if what == "run":
    order = {"module": "own", "arguments": ["a $b", "ä"], "environment": {**os.environ, "RANK": "3"}, "name": "rank 3"}
    ours.sendall(json.dumps(order).encode())
ours.close()
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""

OWN = """
import json, os, random, signal, sys
import numpy as np

if __name__ == "__main__":
    facts = {
        "argv": sys.argv[1:], "spec": __spec__.name, "rank": os.environ["RANK"], "secret": os.environ.get("SECRET"),
        "leads": os.getsid(0) == os.getpgid(0) == os.getpid(), "ppid": os.getppid(),
        "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "imported": sorted({"decimal", "numpy.ma"} & set(sys.modules)),
        "descriptors": sorted(int(each) for each in os.listdir("/proc/self/fd"))[:-1],
        "name": open("/proc/self/comm").read().strip(), "hash": hash("trainfleet"),
        "random": [random.random(), float(np.random.rand())],
    }
    print(json.dumps(facts), flush=True)
    sys.exit(7)
"""


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "threads.py").write_text(
        "import threading, time; threading.Thread(target=time.sleep, args=[9]).start()"
    )
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # NumPy's library makes a thread for the second, which is no obstacle
    started: list[subprocess.Popen[str]] = []

    def launched(what: str, *modules: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(tmp_path / "launcher.py"), what, *modules]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield launched
    for process in started:
        process.kill()
        process.communicate()


def test_a_copy_runs_as_a_fresh_interpreter_would_and_has_imported(launched, tmp_path):
    launcher = launched("run", "decimal", "numpy.ma")
    lines = launcher.communicate(timeout=60)[0].splitlines()
    facts = json.loads(lines[1])
    fresh = [sys.executable, "-m", "own", "a $b", "ä"]
    plain = subprocess.run(fresh, env={**os.environ, "RANK": "3"}, capture_output=True, text=True, timeout=60)
    expected = json.loads(plain.stdout)
    same = ("argv", "spec", "rank", "secret", "sigint", "descriptors", "hash")
    assert {key: facts[key] for key in same} == {key: expected[key] for key in same}
    assert facts["imported"] == ["decimal", "numpy.ma"] and expected["imported"] == []
    assert (facts["leads"], facts["ppid"], facts["name"]) == (True, launcher.pid, "rank 3")
    assert lines[2] == "7"


def test_copies_draw_random_numbers_of_their_own(launched):
    drawn = []
    for launcher in (launched("run", "numpy"), launched("run", "numpy")):
        drawn += json.loads(launcher.communicate(timeout=60)[0].splitlines()[1])["random"]
    assert len(set(drawn)) == 4


def test_with_a_second_thread_there_is_no_copy(launched):
    said, _ = launched("run", "threads").communicate(timeout=60)
    assert said == "not ready, 0\n"


def test_a_copy_whose_launcher_asks_no_more_runs_nothing(launched):
    lines = launched("forget").communicate(timeout=60)[0].splitlines()
    assert lines[1:] == ["1"]


def test_what_was_copied_dies_with_its_launcher_before_it_was_told_what_to_run(launched):
    launcher = launched("die")
    processes = [psutil.Process(int(pid)) for pid in launcher.stdout.readline().split()]
    assert all(process.is_running() for process in processes)
    launcher.kill()
    assert psutil.wait_procs(processes, 10)[1] == []


def test_a_process_that_was_started_by_another_ends_at_once():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", preload.__name__, str(theirs.fileno()), "1"]
        assert subprocess.run(command, pass_fds=[theirs.fileno()], timeout=60).returncode == 1


def test_it_ends_when_its_launcher_closes_the_line():
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            command = [sys.executable, "-m", preload.__name__, str(theirs.fileno()), str(os.getpid())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        assert ours.recv(5) == preload.READY
    began = time.monotonic()
    assert process.wait(10) == 0
    assert time.monotonic() - began < 5
