"""Lasting pools of processes, one a world size, on which tests run their functions as ranks of a gloo group.

Starting four ranks by torchrun takes seconds, most of them `import torch`. Here one server imports it and
forks the workers of every pool, which then stay: a call costs milliseconds, a new pool tenths of a second.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

GRACE_SECONDS = 1.0
"""After the first failure, how long the other ranks may take before they are given up."""
PR_SET_PDEATHSIG = 1


class RemoteTraceback(Exception):
    """The cause of an error that a rank raised: its traceback there, as text."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


class RankPool:
    """`size` processes with an initialised default process group."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        # fully_shard imports dynamo, which costs two seconds: once here, not in every worker.
        context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch._dynamo", "numpy.random"])
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="trainfleet-ranks-")
        self._processes = []
        self._pipes: list[Connection] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, self._folder.name), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], deadline_seconds: float) -> list[Any]:
        """What `function(*args)` returns on each rank; raises what the first failing rank raised."""
        module = sys.modules[function.__module__]
        call = pickle.dumps((function, args))
        message = pickle.dumps((sys.path, (module.__name__, getattr(module, "__file__", None)), call))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        ends = time.monotonic() + deadline_seconds
        results: dict[int, Any] = {}
        failure: BaseException | None = None
        while len(results) < self.size:
            waiting = {self._pipes[rank]: rank for rank in range(self.size) if rank not in results}
            ready = wait(list(waiting), timeout=max(0.0, ends - time.monotonic()))
            if not ready:
                raise failure or TimeoutError(
                    f"Ranks {sorted(waiting.values())} of {self.size} did not return within {deadline_seconds:g} s.\n"
                    + self._stacks(list(waiting.values()))
                )
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                results[rank], error = self._answer(rank)
                if error is not None and failure is None:
                    failure, ends = error, min(ends, time.monotonic() + GRACE_SECONDS)
        if failure is not None:
            raise failure
        return [results[rank] for rank in range(self.size)]

    def _answer(self, rank: int) -> tuple[Any, BaseException | None]:
        try:
            result, error, text = pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            self._processes[rank].join(GRACE_SECONDS)
            code = self._processes[rank].exitcode
            return None, RuntimeError(f"Rank {rank} of {self.size} died with exit code {code}.")
        if text is None:
            return result, None
        failure = pickle.loads(error) if error is not None else RuntimeError(f"A rank failed:\n{text}")
        failure.__cause__ = RemoteTraceback(f"Rank {rank} of {self.size}:\n{text}")
        return None, failure

    def _stacks(self, ranks: list[int]) -> str:
        for rank in ranks:
            pid = self._processes[rank].pid
            if pid is not None and self._processes[rank].is_alive():
                os.kill(pid, signal.SIGUSR1)
        time.sleep(0.3)
        return "\n".join(f"Rank {r}:\n" + (Path(self._folder.name) / f"stack-{r}").read_text() for r in ranks)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


class RankPools:
    """Makes pools as they are asked for, and replaces one after any failure: its ranks may be out of step."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def __call__(
        self, size: int, function: Callable[..., Any], *args: Any, deadline_seconds: float = 120.0
    ) -> list[Any]:
        """`function(*args)`, defined at the top of its file, on each of `size` ranks; the results by rank."""
        if size not in self._pools:
            self._pools[size] = RankPool(size)
        try:
            return self._pools[size].run(function, args, deadline_seconds)
        except BaseException:
            self._pools.pop(size).close()
            raise

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


def _serve(pipe: Connection, rank: int, size: int, folder: str) -> None:
    """The life of a worker: meet the others, then run what comes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business, which then ends us
    stack = (Path(folder) / f"stack-{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, stack)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=100))
    environment = dict(os.environ)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        result, error, text = None, None, None
        try:
            result = _run(message)
        except BaseException as exc:
            text = traceback.format_exc()
            try:
                error = pickle.dumps(exc)
                pickle.loads(error)
            except Exception:
                error = None
        try:
            answer = pickle.dumps((result, error, text))
        except Exception:
            answer = pickle.dumps((None, None, f"The result cannot be pickled.\n{traceback.format_exc()}"))
        pipe.send_bytes(answer)
        os.environ.clear()
        os.environ.update(environment)


def _run(message: bytes) -> Any:
    import numpy as np
    import torch

    path, (name, file), call = pickle.loads(message)
    sys.path[:] = path
    if name not in sys.modules and file is not None:
        _import_file(name, file)
    function, args = pickle.loads(call)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    return function(*args)


def _import_file(name: str, file: str) -> None:
    """The module under the name that pytest gave it, `tests.comm.test_group`, whatever `sys.path` says."""
    parents = name.split(".")[:-1]
    for depth in range(len(parents), 0, -1):
        parent = types.ModuleType(".".join(parents[:depth]))
        parent.__path__ = [str(Path(file).parents[len(parents) - depth])]
        sys.modules.setdefault(parent.__name__, parent)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
