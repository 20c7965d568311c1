"""The ranks of an mpiexec agree on a place through its key-value space, and leave it fit for MPI_Init."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from trainfleet.comm import pmi
from trainfleet.errors import LaunchError, PeerError

MPIEXEC = Path(sys.executable).parent / "mpiexec"
SOON = timedelta(seconds=5)


class Launcher:
    """The part of Hydra that answers, for processes that are threads here."""

    def __init__(self, size: int, replies: dict[str, str] | None = None) -> None:
        self.replies = replies or {}
        self.said: list[str] = []
        self.values: dict[str, str] = {}
        self.barrier = threading.Barrier(size)
        self.pairs = [socket.socketpair() for _ in range(size)]
        for ours, _ in self.pairs:
            threading.Thread(target=self.serve, args=(ours,), daemon=True).start()

    def lines(self, connection: socket.socket) -> Iterator[str]:
        with suppress(OSError):  # the test has ended
            yield from connection.makefile("r")

    def serve(self, connection: socket.socket) -> None:
        for line in self.lines(connection):
            self.said.append(line.strip())
            words = dict(part.split("=", 1) for part in line.split())
            command = words["cmd"]
            if command == "put":
                self.values[words["key"]] = words["value"]
            if command == "barrier_in":
                try:
                    self.barrier.wait(10)
                except threading.BrokenBarrierError:
                    return
            answers = {
                "init": "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0",
                "get_my_kvsname": "cmd=my_kvsname kvsname=kvs_1",
                "put": "cmd=put_result rc=0 msg=success",
                "barrier_in": "cmd=barrier_out",
                "get": f"cmd=get_result rc=0 value={self.values.get(words.get('key', ''))}",
            }
            with suppress(OSError):
                connection.sendall(f"{self.replies.get(command, answers[command])}\n".encode())

    def descriptor(self, rank: int) -> str:
        return str(self.pairs[rank][1].fileno())

    def close(self) -> None:
        self.barrier.abort()
        for pair in self.pairs:
            for end in pair:
                end.close()


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    made = Launcher(1)
    yield made
    made.close()


def test_the_word_of_rank_0_reaches_all(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher(3)
    spaces = [pmi._Space(int(launcher.descriptor(rank)), SOON) for rank in range(3)]
    heard: dict[int, str] = {}

    def exchange(rank: int) -> None:
        heard[rank] = spaces[rank].exchange("node-0:4321" if rank == 0 else None)

    threads = [threading.Thread(target=exchange, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    launcher.close()
    assert heard == dict.fromkeys(range(3), "node-0:4321")
    assert not any("finalize" in line for line in launcher.said)  # MPI_Init of the program may still come


def test_a_refusal_is_told_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher(1, replies={"put": "cmd=put_result rc=-1 msg=full"})
    monkeypatch.setenv("PMI_FD", launcher.descriptor(0))
    with pytest.raises(LaunchError, match="answered 'cmd=put_result rc=-1 msg=full'"):
        pmi.tell_all("a:1", SOON)
    launcher.close()


def test_ranks_that_do_not_come_are_waited_for_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher(2)
    monkeypatch.setenv("PMI_FD", launcher.descriptor(0))
    with pytest.raises(PeerError, match=r"Not all ranks of this mpiexec came within 0\.2 s"):
        pmi.tell_all("a:1", timedelta(seconds=0.2))
    launcher.close()


def test_a_descriptor_that_is_not_open_is_told(monkeypatch: pytest.MonkeyPatch, launcher: Launcher) -> None:
    closed = os.dup(0)
    os.close(closed)
    monkeypatch.setenv("PMI_FD", str(closed))
    with pytest.raises(LaunchError, match="does not answer there: Bad file descriptor"):
        pmi.tell_all("a:1", SOON)


def test_a_launcher_without_a_socket_has_no_space() -> None:
    assert pmi.has_space({"PMI_FD": "7"})
    assert not pmi.has_space({"PMI_FD": ""}) and not pmi.has_space({"PMI_RANK": "0"})


PROGRAM = r"""
import os
from datetime import timedelta
from trainfleet.comm import pmi
rank = os.environ["PMI_RANK"]
if BEFORE:
    from mpi4py import MPI
word = pmi.tell_all("here:1" if rank == "0" else None, timedelta(seconds=20))
from mpi4py import MPI
os.write(1, f"{word} {MPI.COMM_WORLD.allreduce(1)}\n".encode())
"""


@pytest.mark.cluster
@pytest.mark.parametrize("before", [False, True], ids=["MPI_Init after", "MPI_Init before"])
def test_it_goes_together_with_mpi_itself(before: bool) -> None:
    pytest.importorskip("mpi4py", reason="MPI is not installed: pip install 'trainfleet[mpi]'")
    if not MPIEXEC.exists():
        pytest.skip("there is no mpiexec beside this Python: pip install mpich")
    program = PROGRAM.replace("BEFORE", str(before))
    done = subprocess.run(
        [str(MPIEXEC), "-n", "2", sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["here:1 2"] * 2


LATE = r"""
import os, time
from datetime import timedelta
from mpi4py import MPI
from trainfleet.comm import pmi
from trainfleet.errors import PeerError
if os.environ["PMI_RANK"] == "0":
    time.sleep(3)
    word = pmi.tell_all("here:1", timedelta(seconds=20))
else:
    try:
        word = pmi.tell_all(None, timedelta(seconds=0.3))
    except PeerError as error:
        word = str(error)
os.write(1, f"{word}\n".encode())
os._exit(0)
"""


@pytest.mark.cluster
def test_a_word_over_mpi_itself_has_a_deadline() -> None:
    pytest.importorskip("mpi4py", reason="MPI is not installed: pip install 'trainfleet[mpi]'")
    if not MPIEXEC.exists():
        pytest.skip("there is no mpiexec beside this Python: pip install mpich")
    done = subprocess.run(
        [str(MPIEXEC), "-n", "2", sys.executable, "-c", LATE], capture_output=True, text=True, timeout=60
    )
    assert "Not all ranks of this mpiexec came within 0.3 s" in done.stdout, done.stdout + done.stderr
