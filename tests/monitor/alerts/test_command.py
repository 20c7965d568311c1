from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from trainfleet.monitor.alerts.command import SHOWN_BYTES, Command
from trainfleet.monitor.alerts.facts import Facts

FACTS = Facts(alert="loss > 5", text="loss is 7", step=3, value=7.0, run="runs/x", host="a")


def run(text: str, *, shell: bool = False, timeout_seconds: float = 20.0) -> None:
    Command(text, shell=shell, timeout_seconds=timeout_seconds).run(FACTS)
    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]


def test_it_gets_the_facts_and_what_it_prints_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="trainfleet"):
        run(f"{sys.executable} -c \"import os; print(os.environ['ALERT_WHEN'], os.environ['ALERT_STEP'])\"")
    assert caplog.messages == ["The command of alert 'loss > 5' ended with 0. It printed: loss > 5 3"]


def test_there_is_no_shell_unless_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="trainfleet"):
        run("echo $ALERT_STEP | cat")
        run("echo $ALERT_STEP | cat", shell=True)
    assert [message.partition("printed: ")[2] for message in caplog.messages] == ["$ALERT_STEP | cat", "3"]


@pytest.mark.parametrize("text", ["./is-not-there", "sh -c 'echo broken >&2; exit 3'"])
def test_one_that_fails_is_a_warning_with_what_it_printed(text: str, caplog: pytest.LogCaptureFixture) -> None:
    run(text)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and (
        "broken" in record.getMessage() or "is-not-there" in record.getMessage()
    )


def test_one_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"had not ended after 0\.5 s, and was killed. It printed: hm"):
        run(f"echo hm; sleep 60 & echo $! > {tmp_path}/child; sleep 60", shell=True, timeout_seconds=0.5)
    assert time.monotonic() - began < 10
    child = int((tmp_path / "child").read_text())
    ends = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_a_child_that_stays_holds_nobody_up() -> None:
    began = time.monotonic()
    run("sleep 30 & echo gone", shell=True)
    assert time.monotonic() - began < 10


def test_of_much_output_the_first_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="trainfleet"):
        run("head -c 3000000 /dev/zero | tr '\\0' x", shell=True)
    assert caplog.messages[0].count("x") == SHOWN_BYTES


def test_it_can_be_killed_from_outside() -> None:
    command = Command("sleep 60", shell=False, timeout_seconds=60)
    thread = threading.Thread(target=command.run, args=(FACTS,))
    thread.start()
    ends = time.monotonic() + 10
    while thread.is_alive():
        command.kill()
        thread.join(0.05)
        assert time.monotonic() < ends


@pytest.mark.skipif(sys.platform != "linux", reason="`timeout` is a program of Linux")
def test_it_ends_in_time_even_if_the_run_is_killed_before(tmp_path: Path) -> None:
    program = f"""
import sys, threading, os, time
from trainfleet.monitor.alerts import command, facts
command.Command._end_by_itself = lambda self, whole=command.Command._end_by_itself: [*whole(self)[:-1], "1"]
told = facts.Facts(alert="a", text="b", step=1, value=1.0, run="")
run = command.Command("sh -c 'echo $$ > {tmp_path}/pid; sleep 60'", shell=False, timeout_seconds=30).run
threading.Thread(target=run, args=(told,), daemon=True).start()
while not os.path.exists("{tmp_path}/pid") or not open("{tmp_path}/pid").read().strip(): time.sleep(0.01)
os.kill(os.getpid(), 9)
"""
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", program]) == -9
    pid, ends = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < ends
        time.sleep(0.05)
