"""One rank needs no mpiexec and no watchdog; `test_watchdog` has several."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trainfleet.errors import PeerError, PlanError
from trainfleet.mpi.world import _exit_code

PROGRAM = """
import numpy as np
from trainfleet.mpi import world
with world() as group:
    group.all_reduce_(np.ones(3)).wait()
    group.barrier()
    print(group, group.exchange(7))
    {act}
"""


def alone(act):
    pytest.importorskip("mpi4py", reason="MPI is not installed: pip install 'trainfleet[mpi]'")
    # Where pytest itself runs under mpiexec, a child would take itself for one of its ranks.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "MPI", "HYDI"))}
    command = [sys.executable, "-c", PROGRAM.format(act=act)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_one_rank_is_a_world():
    assert alone("pass").stdout == "MpiGroup(world, rank 0 of 1) [7]\n"


def test_the_error_of_one_rank_alone_is_its_own():
    assert "KeyError: 'mine'" in alone("raise KeyError('mine')").stderr


def test_exit_codes_are_those_of_the_errors():
    errors = [PlanError("x"), PeerError("x"), SystemExit(4), SystemExit("x"), KeyboardInterrupt()]
    assert [_exit_code(error) for error in errors] == [3, 9, 4, 1, 130]
