from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from trainfleet.errors import DependencyError, PeerError
from trainfleet.net.program import Program

pytestmark = pytest.mark.usefixtures("leaves_nothing")


def program(text: str) -> Program:
    return Program([sys.executable, "-u", "-c", text], remedy="Install Python.", noise=("debug",))


def test_what_it_says_is_found_before_and_after_it_is_asked_for():
    for pause in (0.0, 0.3):
        running = program(f"import time; time.sleep({pause}); print('port 77 is open'); time.sleep(60)")
        time.sleep(0.15)
        assert running.find(r"port (\d+)", 5)[1] == "77"
        assert running.is_running
        running.close()
        running.close()
        assert not running.is_running


def test_one_that_ends_without_the_word_is_a_sentence_with_its_last():
    running = program("print('Permission denied.'); print('debug1: exit'); raise SystemExit(3)")
    with pytest.raises(PeerError, match=r"ended: Permission denied\.$"):
        running.find("port", 5)


def test_one_that_says_nothing_in_time_is_ended():
    running = program("import time; time.sleep(60)")
    with pytest.raises(PeerError, match=r"was not ready within 0\.2 s: it said nothing\."):
        running.find("port", 0.2)
    assert not running.is_running


def test_one_that_does_not_end_by_itself_is_killed(monkeypatch):
    monkeypatch.setattr("trainfleet.net.program._END_SECONDS", 0.2)
    running = program("import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)")
    running.find("up", 5)
    running.close()
    assert not running.is_running


def test_one_that_is_missing_is_a_sentence_with_the_remedy():
    with pytest.raises(DependencyError, match="There is no no-such-program on this host") as raised:
        Program(["no-such-program"], remedy="Install it.")
    assert raised.value.hint == "Install it."


def test_its_loss_is_said(caplog):
    running = program("print('up'); input_ = __import__('time').sleep(0.1); print('lost the connection')")
    running.find("up", 5)
    running.has_ended.wait(5)
    running.close()
    assert "nobody can come in that way any more: lost the connection" in caplog.messages[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a program with who started it")
def test_it_ends_even_if_we_are_killed():
    ours = """
import sys, time
from trainfleet.net.program import Program
running = Program([sys.executable, "-u", "-c", "import os, time; print('pid', os.getpid()); time.sleep(60)"], remedy="")
print(running.find(r"pid (\\d+)", 10)[1], flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", ours], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    process.stdout.close()
    ends = time.monotonic() + 5
    while _runs(child) and time.monotonic() < ends:
        time.sleep(0.02)
    assert not _runs(child)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
