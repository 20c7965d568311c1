"""Which rank failed first is said by a process that mpiexec does not end."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trainfleet.comm.threads import run_ranks
from trainfleet.mpi.watchdog import Watchdog, report


def test_a_death_and_an_error_are_told_apart(capfd):
    report("Rank 2", "ValueError: no")
    assert capfd.readouterr().err == "trainfleet: Rank 2 failed first: ValueError: no\n"
    report("Rank 1", "died")
    assert "Rank 1 died without a word, and mpiexec ends the others." in capfd.readouterr().err


def test_the_sentence_has_been_read_before_ranks_may_abort():
    program = f"import {report.__module__} as dog; dog._READ_SECONDS = 30; dog.report('Rank 1', 'died'); print('said')"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as told:
        assert told.stdout is not None and told.stderr is not None
        assert select.select([told.stderr], [], [], 30)[0]
        assert not select.select([told.stdout], [], [], 0.3)[0]
        os.read(told.stderr.fileno(), 65536)
        assert told.stdout.read() == b"said\n"


def test_only_the_first_error_is_said(capfd):
    def fail(group):
        watchdog = Watchdog(group)
        group.barrier()
        if group.rank == 1:
            time.sleep(0.3)
        watchdog.tell(ValueError(f"of rank {group.rank}"))

    run_ranks(2, fail)
    said = capfd.readouterr().err
    assert "failed first: ValueError: of rank 0" in said and "of rank 1" not in said


def test_ranks_that_end_well_leave_no_word(capfd):
    run_ranks(3, lambda group: Watchdog(group).end_well())
    time.sleep(0.5)
    assert capfd.readouterr().err == ""


def test_a_process_that_has_ended_is_not_left_as_a_zombie():
    before = set(psutil.Process().children())
    run_ranks(2, lambda group: Watchdog(group).end_well())
    ends = time.monotonic() + 10
    while left := set(psutil.Process().children()) - before:
        assert time.monotonic() < ends, left
        time.sleep(0.02)


PROGRAM = """
import os, signal, sys, time
from datetime import timedelta
import numpy as np
from trainfleet.errors import PlanError
from trainfleet.mpi import world

with world(timeout=timedelta(seconds={seconds})) as group:
    for step in range(3):
        if group.rank == 1 and step == 1:
            {act}
        group.all_reduce_(np.ones(3)).wait()
"""


def under_mpiexec(act, size=3, seconds=30):
    pytest.importorskip("mpi4py", reason="MPI is not installed: pip install 'trainfleet[mpi]'")
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if not mpiexec.exists():
        pytest.skip("there is no mpiexec beside this Python: pip install mpich")
    began = time.monotonic()
    command = [str(mpiexec), "-n", str(size), sys.executable, "-c", PROGRAM.format(act=act, seconds=seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


@pytest.mark.cluster
def test_a_rank_that_is_killed_is_named_though_mpiexec_kills_the_others():
    code, said, seconds = under_mpiexec("os.kill(os.getpid(), signal.SIGKILL)")
    assert code != 0 and seconds < 20
    assert "trainfleet: Rank 1 of 3 (process " in said and "died without a word" in said


@pytest.mark.cluster
def test_a_rank_that_hangs_is_named_at_the_deadline():
    code, said, seconds = under_mpiexec("time.sleep(30)", seconds=3)
    assert code == 9 and seconds < 20, "the exit code is that of PeerError"
    assert "rank 1 did not come and did not answer" in said
    assert "failed first: PeerError: Rank " in said


@pytest.mark.cluster
def test_an_error_of_one_rank_ends_all_with_its_exit_code():
    code, said, seconds = under_mpiexec("raise PlanError('This cannot work.')")
    assert code == 3 and seconds < 20
    assert "failed first: PlanError: This cannot work." in said


@pytest.mark.cluster
def test_a_run_that_ends_well_says_nothing():
    assert under_mpiexec("pass")[:2] == (0, "")
