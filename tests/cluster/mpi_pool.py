"""Lasting pools of ranks under mpiexec, used like those of `rank_pool`; no torch is imported in them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import rank_pool

MPIEXEC = Path(sys.executable).parent / "mpiexec"


class MpiRank:
    """What a pool asks of a process, for one that mpiexec has started."""

    def __init__(self, mpiexec: subprocess.Popen[bytes], pid: int) -> None:
        self.pid = pid
        self._mpiexec = mpiexec

    def is_alive(self) -> bool:
        return self._mpiexec.poll() is None

    @property
    def exitcode(self) -> int | None:
        return self._mpiexec.poll()

    def kill(self) -> None:
        self._mpiexec.kill()

    def join(self, timeout: float) -> None:
        self._mpiexec.wait(timeout)


class MpiPool(rank_pool.RankPool):
    """`size` processes of one mpiexec; what they print goes to a file that an error quotes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="trainfleet-mpi-")
        address = str(Path(self._folder.name) / "meeting")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with Listener(address, "AF_UNIX") as listener:
            listener._listener._socket.settimeout(60)  # type: ignore[attr-defined]
            command = [str(MPIEXEC), "-n", str(size), sys.executable, __file__, address, self._folder.name]
            mpiexec = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
            pipes = [listener.accept() for _ in range(size)]
        heads = {rank: (pid, pipe) for pipe in pipes for rank, pid in [pipe.recv()]}
        self._pipes = [heads[rank][1] for rank in range(size)]
        self._processes = [MpiRank(mpiexec, heads[rank][0]) for rank in range(size)]  # type: ignore[misc]


class MpiPools(rank_pool.RankPools):
    """Pools under mpiexec by size; functions get the `MpiGroup` of all ranks as their first argument."""

    def __call__(self, size: int, function: Any, *args: Any, deadline_seconds: float = 60.0) -> list[Any]:
        if size not in self._pools:
            self._pools[size] = MpiPool(size)
        return super().__call__(size, function, *args, deadline_seconds=deadline_seconds)


def serve(address: str, folder: str) -> None:
    import faulthandler
    import signal

    from trainfleet.comm.mpi_group import MpiGroup

    group = MpiGroup.world()
    stack = (Path(folder) / f"stack-{group.rank}").open("w")
    faulthandler.register(signal.SIGUSR1, stack)
    pipe: Connection = Client(address, "AF_UNIX")
    pipe.send((group.rank, os.getpid()))
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        result, error, text = None, None, None
        try:
            result = _run(message, group)
        except BaseException as exc:
            text = traceback.format_exc()
            try:
                error = pickle.dumps(exc)
                pickle.loads(error)
            except Exception:
                error = None
        pipe.send_bytes(pickle.dumps((result, error, text)))


def _run(message: bytes, group: Any) -> Any:
    import numpy as np

    path, (name, file), call = pickle.loads(message)
    sys.path[:] = path
    if name not in sys.modules and file is not None:
        rank_pool._import_file(name, file)
    function, args = pickle.loads(call)
    np.random.seed(0)
    return function(group, *args)


if __name__ == "__main__":
    serve(*sys.argv[1:])
