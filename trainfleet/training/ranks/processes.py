"""The processes of the ranks of one start: fresh interpreters that run a command, or copies of one that is ready."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, cast

from torch.distributed.elastic.agent.server.api import WorkerGroup
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

from trainfleet.training.ranks.copies import Copy, NoCopies, Preloaded

logger = logging.getLogger(__name__)

LEFT_BEHIND_SECONDS = 5
"""For ranks to end once another has failed; a save that is nearly done may still be committed."""

# The command of a rank replaces this program, and keeps what it asked of the kernel: to be killed when its parent
# is. A parent that has died in between is seen by its process id. `-I -S` because nothing else is needed: 10 ms.
_DIE_WITH_PARENT = """
import ctypes, os, sys
parent, threads, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != parent:
        os._exit(1)
if threads:
    os.environ["OMP_NUM_THREADS"] = threads
try:
    os.execvp(command[0], command)
except OSError as exc:
    sys.exit(f"{command[0]!r} cannot be started: {exc.strerror}.")
"""


class RankProcesses(SubprocessContext):
    """Torch's watch over processes, which starts copies where that is possible."""

    def __init__(
        self,
        command: Sequence[str],
        environments: dict[int, dict[str, str]],
        logs: LogsSpecs,
        *,
        threads: int | None,
        preloaded: Preloaded | None,
    ) -> None:
        """`environments` holds, by local rank, what is added to this process's own.

        A copy is made of `preloaded`, and only for a command `python -m module ...` of this very Python.
        """
        wrapped = ("-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), str(threads or ""), *command)
        super().__init__("trainfleet", sys.executable, dict.fromkeys(environments, wrapped), environments, logs)
        self._command, self._threads = list(command), threads
        self._preloaded = preloaded if self._command[:2] == [sys.executable, "-m"] else None

    def _start(self) -> None:
        copied_from = self._preloaded
        for local_rank in range(self.nprocs):
            if copied_from is not None:
                try:
                    self.subprocess_handlers[local_rank] = self._copy(copied_from, local_rank)
                    continue
                except NoCopies as exc:
                    logger.info("The ranks import everything anew: %s.", exc)
                    copied_from = None
            self.subprocess_handlers[local_rank] = SubprocessHandler(
                sys.executable, self.args[local_rank], self.envs[local_rank], None, None, local_rank, None
            )

    def _copy(self, preloaded: Preloaded, local_rank: int) -> SubprocessHandler:
        environment = {**os.environ, **self.envs[local_rank]}
        if self._threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._threads)
        module, *arguments = self._command[2:]
        return _CopyHandler(preloaded.copy(module, arguments, environment, name=f"rank {environment['RANK']}"))

    def close(self, death_sig: signal.Signals | None = None, timeout: int = LEFT_BEHIND_SECONDS) -> None:
        super().close(death_sig, timeout)  # torch would give a rank that hangs half a minute


class _CopyHandler(SubprocessHandler):
    """A copy, where torch expects what has started a process."""

    def __init__(self, copy: Copy) -> None:
        self.proc = cast(Any, copy)
        self._stdout = self._stderr = None


def environments(group: WorkerGroup, restarts: int) -> dict[int, dict[str, str]]:
    """What torch's agent tells each rank of this host, by local rank, in the words of torchrun."""
    spec = group.spec
    return {
        worker.local_rank: {
            "RANK": str(worker.global_rank),
            "WORLD_SIZE": str(worker.world_size),
            "LOCAL_RANK": str(worker.local_rank),
            "LOCAL_WORLD_SIZE": str(spec.local_world_size),
            "GROUP_RANK": str(group.group_rank),
            "GROUP_WORLD_SIZE": str(group.group_world_size),
            "ROLE_NAME": spec.role,
            "ROLE_RANK": str(worker.role_rank),
            "ROLE_WORLD_SIZE": str(worker.role_world_size),
            "MASTER_ADDR": str(group.master_addr),
            "MASTER_PORT": str(group.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(restarts),
            "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }
        for worker in group.workers
    }
