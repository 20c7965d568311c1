"""A command on a tether ends with whoever holds the other end, and is asked only once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

COUNTS = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print("up", os.getpid(), flush=True)
ends = time.time() + 30
while not asked and time.time() < ends:
    time.sleep(0.01)
time.sleep(float(sys.argv[1]))
print("asked", len(asked), flush=True)
sys.exit(7)
"""


class Held:
    """A tether whose other end is ours."""

    def __init__(self, *command: str, grace: float = 20) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainfleet.launchers.tether", "--grace", str(grace), "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.pid = 0

    def await_child(self) -> None:
        assert self.process.stdout is not None
        word, pid = self.process.stdout.readline().split()
        assert word == b"up"
        self.pid = int(pid)

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())
        self.process.stdin.flush()

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def ended(self) -> tuple[int, str]:
        assert self.process.stdout is not None
        said = self.process.stdout.read().decode()
        return self.process.wait(20), said.strip()


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held(sys.executable, "-c", COUNTS, "0.3")
    made.await_child()
    yield made
    made.process.kill()


def test_the_exit_code_is_that_of_the_command() -> None:
    assert Held(sys.executable, "-c", "print('hello'); raise SystemExit(5)").ended() == (5, "hello")
    assert Held(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)").ended() == (137, "")


def test_a_command_that_does_not_exist_is_named() -> None:
    code, said = Held("no-such-command-here").ended()
    assert code == 127 and "'no-such-command-here' cannot be started: No such file or directory." in said


def test_the_word_end_asks_once_however_often_it_is_said(held: Held) -> None:
    for _ in range(3):
        held.say("end")
    held.process.terminate()
    assert held.ended() == (7, "asked 1")


def test_letting_go_asks_for_the_end(held: Held) -> None:
    held.let_go()
    assert held.ended() == (7, "asked 1")


def test_the_word_kill_kills() -> None:
    held = Held(sys.executable, "-c", COUNTS, "30")
    held.await_child()
    held.say("kill")
    assert held.ended() == (137, "")


def test_what_does_not_end_within_the_grace_is_killed() -> None:
    held = Held(sys.executable, "-c", COUNTS, "30", grace=0.3)
    held.await_child()
    began = time.monotonic()
    held.let_go()
    assert held.ended() == (137, "")
    assert time.monotonic() - began < 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux kills a child with its parent")
def test_a_tether_that_is_killed_leaves_nothing_behind(held: Held) -> None:
    held.process.kill()
    ends = time.monotonic() + 10
    while psutil.pid_exists(held.pid) and time.monotonic() < ends:
        if psutil.Process(held.pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.02)
    else:
        assert not psutil.pid_exists(held.pid)


def test_the_words_are_not_for_the_command() -> None:
    held = Held(sys.executable, "-c", "import sys; print(repr(sys.stdin.read()))")
    assert held.ended() == (0, "''")


def test_importing_it_needs_no_torch() -> None:
    program = "import sys, trainfleet.launchers.tether; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path.cwd(), env=dict(os.environ)).returncode == 0
