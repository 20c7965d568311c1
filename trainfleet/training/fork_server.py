"""The process that ranks of this host are copied from: it has imported everything, so that a start costs no imports.

It is Python's fork server: a fresh interpreter that keeps to one thread, imports, and forks when it is asked. Without
it every start of every rank, also after a failure, would begin with seconds of imports. Ranks share its memory.

    launcher ── starts ──> fork server ── forks ──> rank 0, rank 1, ...

A killed launcher takes all of them along: the server ends when the launcher's end of a pipe closes, and each rank
has asked the kernel to be killed when the server ends.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver
from multiprocessing.connection import wait
from typing import Any

CAN_FORK = sys.platform == "linux"
"""Elsewhere ranks are fresh interpreters: no kernel has a word for dying with a parent, and libraries forbid forks."""

IMPORTED = (
    "typer",
    "trainfleet.cli.rank",
    "trainfleet.training.job",
    "trainfleet.training.trainer",
    "torch._dynamo",  # the first optimizer imports it, compiled or not: half a second
    "torch.distributed.fsdp",
)
"""What every rank needs. Nothing here may start threads or touch a GPU."""

# For the launcher to hear, which passes them on in its own words: the server must outlive what the ranks do then.
_NOT_FOR_THE_SERVER = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT) if CAN_FORK else ()
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def warm_up(*, threads: int | None) -> None:
    """Start the server now, so that it imports while the launcher does other things. It may be called again.

    `threads` is each rank's share of the cores, for all libraries that read OMP_NUM_THREADS.
    """
    if not CAN_FORK:
        return
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    before = os.environ.get("OMP_NUM_THREADS")
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_THE_SERVER)  # inherited by what is started
    try:
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        if threads is not None and before is None:
            del os.environ["OMP_NUM_THREADS"]


def become_rank(rank: int) -> None:
    """In a copy of the server: die with it, hear signals again, and be called by one's number in lists of processes."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = multiprocessing.parent_process()
    if launcher is None or wait([launcher.sentinel], 0):
        os._exit(1)  # it died before the kernel was asked
    libc.prctl(_PR_SET_NAME, f"rank {rank}".encode())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOT_FOR_THE_SERVER)
    # The server lives as long as anybody holds this pipe; only the launcher is to.
    server: Any = forkserver._forkserver
    if (pipe := server._forkserver_alive_fd) is not None:
        server._forkserver_alive_fd = None
        os.close(pipe)
