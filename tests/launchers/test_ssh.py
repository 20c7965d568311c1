"""Over ssh a run trains on all hosts or on none, and nothing stays behind on any of them."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from free_ports import free_port
from small_job import Job, write_job

FAKE_SSH = """#!/usr/bin/env bash
# In place of ssh: the command of every host runs here.
while [ "$1" = -o ]; do shift 2; done
case "$1" in unreachable) echo "ssh: connect to host unreachable port 22: No route to host" >&2; exit 255;; esac
FAR_HOST=$1 exec bash -c "$2"
"""
pytestmark = pytest.mark.cluster


def launch(*words: str) -> list[str]:
    return ["trainfleet", "launch", "ssh", "recipe.yaml", "--rendezvous", f"127.0.0.1:{free_port()}", *words]


def with_fake_ssh(job: Job) -> Job:
    place = job.folder.parent / "bin"
    place.mkdir(exist_ok=True)
    (place / "ssh").write_text(FAKE_SSH)
    (place / "ssh").chmod(0o755)
    job.env.update(PATH=f"{place}:{job.env['PATH']}", OMP_NUM_THREADS="1")
    return job


@pytest.fixture
def near(job: Job) -> Job:
    """The job, where `ssh` is a script that runs the command here."""
    return with_fake_ssh(job)


def ours(job: Job) -> list[psutil.Process]:
    """What still runs in the folder of the job."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == job.folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def await_none(job: Job, seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while left := ours(job):
        assert time.monotonic() < ends, [process.cmdline() for process in left]
        time.sleep(0.1)


def await_losses(job: Job, process: subprocess.Popen[str], seconds: float = 90) -> None:
    ends = time.monotonic() + seconds
    while not (job.folder / "run" / "metrics.jsonl").exists() or not job.losses():
        assert process.poll() is None and time.monotonic() < ends, process.communicate()[0]
        time.sleep(0.1)


@pytest.mark.matrix
def test_two_hosts_train_as_one_does_and_what_they_say_bears_their_names(near: Job, plain: dict[int, float]) -> None:
    said = near.run(launch("--hosts", "127.0.0.1,127.0.0.2", "monitor.console=true"))
    assert near.losses() == plain
    assert re.search(r"^\[127\.0\.0\.[12]\] .*6/6", said, re.MULTILINE), said  # either may have rank 0
    assert ours(near) == []


@pytest.mark.matrix
def test_a_host_that_fails_ends_the_others_and_is_named(near: Job) -> None:
    process = near.start(launch("--hosts", "127.0.0.1,127.0.0.2", "data.source=learner:Breaks", "train.steps=50"))
    said, _ = process.communicate(timeout=90)
    assert process.returncode not in (0, None)
    assert "sample 13 is rotten" in said
    assert re.search(r"trainfleet: The run failed on 127\.0\.0\.[12] with exit code \d+", said), said
    await_none(near)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
@pytest.mark.matrix
def test_the_end_of_the_launcher_is_the_end_everywhere(near: Job, number: signal.Signals) -> None:
    slow = ["data.source=learner:Slow", "train.steps=400", "checkpoint.every=1000"]
    process = near.start(launch("--hosts", "127.0.0.1,127.0.0.2", *slow))
    await_losses(near, process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -9), said
    await_none(near)
    assert [path.name for path in (near.folder / "run" / "checkpoints").glob("step-*")], "it saved before it ended"


@pytest.mark.matrix
def test_an_unreachable_host_is_named_and_nothing_is_started(near: Job) -> None:
    words = ["trainfleet", "launch", "ssh", "recipe.yaml", "--hosts", "near,unreachable", "--no-check"]
    process = near.start([*words, "--rendezvous", f"{socket.gethostname()}:{free_port()}"])
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 8
    assert "trainfleet: ssh does not reach unreachable: ssh: connect to host unreachable port 22: No route" in said
    assert "ssh -o BatchMode=yes unreachable true" in said
    assert not (near.folder / "run").exists()


def test_what_the_probes_find_is_told_before_anything_starts(near: Job) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        words = ["trainfleet", "launch", "ssh", "recipe.yaml", "--hosts", "127.0.0.1,127.0.0.2", "--no-check"]
        process = near.start([*words, "--rendezvous", f"127.0.0.1:{taken}"])
        said, _ = process.communicate(timeout=60)
    assert (process.returncode, f"Port {taken} of 127.0.0.1 is in use" in said) == (8, True), said
    process = near.start([*words, "--rendezvous", "nowhere.invalid:4000"])
    said, _ = process.communicate(timeout=60)
    assert "127.0.0.1 does not know the name nowhere.invalid" in said
    process = near.start([*words, "--python", "/no/such/python"])
    said, _ = process.communicate(timeout=60)
    assert "127.0.0.1 has no trainfleet in /no/such/python" in said


SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Job]:
    """The job, where `ssh` is the system's, with a key for a daemon of this test."""
    if SSHD is None or shutil.which("ssh-keygen") is None:
        pytest.skip("sshd is not installed: apt-get install openssh-server")
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    (keys / "authorized").write_text((keys / "user.pub").read_text())
    number = free_port()
    (keys / "sshd_config").write_text(
        f"Port {number}\nListenAddress 127.0.0.1\nListenAddress 127.0.0.2\nHostKey {keys}/host\nPidFile none\n"
        f"AuthorizedKeysFile {keys}/authorized\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        "PermitRootLogin prohibit-password\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    daemon = subprocess.Popen([SSHD, "-D", "-e", "-f", str(keys / "sshd_config")], stderr=subprocess.DEVNULL)
    job = write_job(tmp_path / "job")
    place = tmp_path / "bin"
    place.mkdir()
    options = f"-p {number} -i {keys}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile={keys}/known"
    (place / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} -l {getpass.getuser()} "$@"\n')
    (place / "ssh").chmod(0o755)
    job.env.update(PATH=f"{place}:{job.env['PATH']}")
    ends = time.monotonic() + 10
    while time.monotonic() < ends:
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", number)) == 0:
                break
        time.sleep(0.05)
    yield job
    daemon.terminate()
    daemon.wait(10)


@pytest.mark.matrix
def test_over_a_real_sshd_it_trains_and_leaves_nothing_behind(far: Job, plain: dict[int, float]) -> None:
    far.run(launch("--hosts", "127.0.0.1,127.0.0.2"))
    assert far.losses() == plain
    slow = ["data.source=learner:Slow", "train.steps=400", "checkpoint.resume=never"]
    process = far.start(launch("--hosts", "127.0.0.1,127.0.0.2", *slow))
    (far.folder / "run" / "metrics.jsonl").unlink()
    await_losses(far, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    await_none(far)


def test_importing_it_needs_no_torch() -> None:
    program = "import sys, trainfleet.launchers.ssh, trainfleet.launchers.probe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
