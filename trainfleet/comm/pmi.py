"""What the ranks of an `mpiexec` tell each other before they meet: the launcher's own key-value space.

Hydra (MPICH, Intel MPI, MVAPICH) gives each process an open socket, PMI_FD, and answers there in lines of text.
So rank 0 can choose an address and a port, and no variable has to be set by hand. Nothing is finalized: a program
that calls MPI_Init later finds the launcher as it was. Where MPI is initialised already, it carries the word itself.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from trainfleet.errors import LaunchError, PeerError

_KEY = "trainfleet-place"
_LONGEST_LINE = 4096


def has_space(env: Mapping[str, str]) -> bool:
    """Whether the launcher of this process keeps a key-value space that `tell_all` can use."""
    return env.get("PMI_FD", "").isdigit()


def tell_all(word: str | None, timeout: timedelta) -> str:
    """The word of rank 0, on all ranks; the others give None. Once in a process: a barrier of the launcher."""
    if _mpi_is_initialised():
        return _broadcast(word, timeout)
    return _Space(int(os.environ["PMI_FD"]), timeout).exchange(word)


class _Space:
    """Questions and answers over the launcher's socket, a line each."""

    def __init__(self, descriptor: int, timeout: timedelta) -> None:
        self._descriptor = descriptor
        self._timeout = timeout
        self._ends = time.monotonic() + timeout.total_seconds()

    def exchange(self, word: str | None) -> str:
        self._ask("cmd=init pmi_version=1 pmi_subversion=1", "response_to_init")
        name = self._ask("cmd=get_my_kvsname", "my_kvsname")["kvsname"]
        if word is not None:
            self._ask(f"cmd=put kvsname={name} key={_KEY} value={word}", "put_result")
        self._ask("cmd=barrier_in", "barrier_out")
        return self._ask(f"cmd=get kvsname={name} key={_KEY}", "get_result")["value"]

    def _ask(self, question: str, expected: str) -> dict[str, str]:
        try:
            os.write(self._descriptor, f"{question}\n".encode())
            line = self._line()
        except OSError as exc:
            raise LaunchError(
                f"PMI_FD is {self._descriptor}, but mpiexec does not answer there: {exc.strerror}.",
                hint="Start the command itself under mpiexec, or set MASTER_ADDR and MASTER_PORT for all ranks.",
            ) from exc
        answer = dict(part.split("=", 1) for part in line.split() if "=" in part)
        if answer.get("cmd") != expected or answer.get("rc", "0") != "0":
            raise LaunchError(
                f"mpiexec answered {line.strip()!r} to {question!r}.",
                hint="Set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there, for all ranks.",
            )
        return answer

    def _line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._descriptor], [], [], max(0.0, self._ends - time.monotonic()))
            if not ready:
                raise _late(self._timeout)
            # One byte at a time: what follows the line belongs to whoever reads this socket next.
            byte = os.read(self._descriptor, 1)
            if not byte or len(line) > _LONGEST_LINE:
                raise LaunchError(f"mpiexec closed the socket PMI_FD after {line!r}.")
            line += byte
        return line.decode("ascii", "replace")


def _mpi_is_initialised() -> bool:
    mpi: Any = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()


def _broadcast(word: str | None, timeout: timedelta) -> str:
    mpi: Any = sys.modules["mpi4py.MPI"]
    line = bytearray((word or "").encode().ljust(_LONGEST_LINE))
    request = mpi.COMM_WORLD.Ibcast([line, mpi.BYTE], root=0)
    ends = time.monotonic() + timeout.total_seconds()
    while not request.Test():
        if time.monotonic() > ends:
            raise _late(timeout)
        time.sleep(0.001)
    return line.decode().strip()


def _late(timeout: timedelta) -> PeerError:
    return PeerError(
        f"Not all ranks of this mpiexec came within {timeout.total_seconds():g} s.",
        hint="Look at what the other ranks say: one has not begun, or failed before it met the others.",
    )
