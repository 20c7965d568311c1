"""Starting the ranks of a run: a function from a script or notebook, or a command on one host or many."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from trainfleet.comm.environment import DEFAULT_PORT, RankEnvironment, is_loopback, threads_per_rank
from trainfleet.comm.rendezvous import address_towards, leave, meet, versions
from trainfleet.errors import LaunchError
from trainfleet.training.ranks.failure import UNGUARDED, reported_failures

if TYPE_CHECKING:
    from trainfleet.training.ranks.agent import Job
    from trainfleet.training.ranks.copies import Preloaded

T = TypeVar("T")


def launch(
    fn: Callable[..., T],
    nproc: int = 2,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    max_restarts: int = 0,
    grace: timedelta = timedelta(minutes=1),
) -> list[T]:
    """`fn(*args, **kwargs)` on each of `nproc` processes of this host; what they return, by rank.

    In each, `Mesh.from_env` finds the others. A function of a script is looked up by its name in a fresh
    interpreter, so the call of `launch` belongs under `if __name__ == "__main__":`; one of a notebook, or one
    without a name of its own, goes with a copy of this process (a fork), which is not possible once CUDA is in use
    and computes with one thread a rank.
    RankFailed names the rank that failed first. After Ctrl-C, ranks have `grace` to save and end; then
    KeyboardInterrupt is raised here.
    """
    _check_nproc(nproc)
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(UNGUARDED)  # the process that started this one says what that means
    environment = RankEnvironment.from_env()
    if environment.world_size > 1:
        raise LaunchError(
            f"launch() was called in rank {environment.rank} of {environment.world_size}, which "
            f"{environment.launcher} has started. Call the function itself: the ranks are already there."
        )
    start_method = _start_method(fn, args, kwargs or {})
    from trainfleet.training.ranks.agent import Job, run_function

    call: Any = (fn, tuple(args), dict(kwargs or {}))
    threads = threads_per_rank(nproc)
    if start_method == "spawn":
        call = pickle.dumps(call)  # here, so that a rank that cannot find the function can say so
    else:
        threads = 1  # OpenMP waits for ever in a copy of a process in which it had made threads
    job = Job(nproc=nproc, max_restarts=max_restarts, grace=grace)
    results = run_function(job, _rank, (call, os.getpid(), threads), start_method=start_method)
    return [pickle.loads(result) for result in results]  # written by our own processes, through a pipe


def run_elastic(
    command: Sequence[str],
    *,
    nproc: int,
    nnodes: int = 1,
    node_rank: int | None = None,
    rendezvous: str | None = None,
    max_restarts: int = 0,
    timeout: timedelta = timedelta(minutes=10),
    grace: timedelta = timedelta(minutes=1),
    preloaded: Preloaded | None = None,
) -> int:
    """Run `command` as `nproc` ranks of this host; 0 when all have ended well, 128 + signal when told to end.

    With `nnodes` hosts, each calls this with the same `rendezvous` (`host:port` of the one that listens, number 0).
    Before any rank starts, the hosts meet there within `timeout` and compare versions: LaunchError or PeerError
    says what is in the way. After a failure all ranks start anew up to `max_restarts` times; then RankFailed
    names the rank that failed first. SIGINT and SIGTERM are passed on, and the ranks have `grace` to save and end;
    a second signal kills them. They die with this process.
    Where the command is `python -m module ...`, ranks are copies of `preloaded` (preload.py) and import nothing anew.
    """
    _check_nproc(nproc)
    meeting = None if nnodes == 1 else _meeting(nnodes, node_rank, rendezvous)
    from trainfleet.training.ranks.agent import Job, run_command

    job = Job(nproc=nproc, max_restarts=max_restarts, timeout=timeout, grace=grace)
    try:
        if meeting is not None:
            job = _meet_hosts(job, meeting)
        return run_command(job, command, threads=threads_per_rank(nproc), preloaded=preloaded)
    finally:
        if meeting is not None:
            leave(meeting.master_addr, meeting.master_port)


def _check_nproc(nproc: int) -> None:
    if nproc < 1:
        raise LaunchError(f"nproc is {nproc}; start at least 1 process.")


def _meeting(nnodes: int, node_rank: int | None, rendezvous: str | None) -> RankEnvironment:
    """Which of `nnodes` hosts this is, and where they meet: the launchers are ranks of a small run of their own."""
    if rendezvous is None:
        raise LaunchError(
            f"nnodes is {nnodes}, but there is no rendezvous. Give every host the same `host:port`, where host is "
            "the first of them and the port is free there."
        )
    host, port = _endpoint(rendezvous)
    listens = node_rank == 0 if node_rank is not None else _is_here(host)
    if node_rank is None and not listens and nnodes > 2:
        raise LaunchError(f"With {nnodes} hosts each needs its number: node_rank 0 (the rendezvous) to {nnodes - 1}.")
    node = 0 if listens else (node_rank or 1)
    if not 0 <= node < nnodes:
        raise LaunchError(f"node_rank is {node}, but the {nnodes} hosts are numbered 0 to {nnodes - 1}.")
    return RankEnvironment(rank=node, world_size=nnodes, master_addr=host, master_port=port)


def _meet_hosts(job: Job, meeting: RankEnvironment) -> Job:
    """Meet the launchers of the other hosts and compare versions; what the agents need to meet at the same place."""
    nnodes, host = meeting.world_size, meeting.master_addr
    meet(meeting, timeout=job.timeout, facts={**versions(), "nnodes": str(nnodes)}, noun="host")
    listens = meeting.rank == 0
    address = host if listens else address_towards(host)
    if address is None:
        raise LaunchError(f"This host has no route to {host}.")
    return replace(job, nnodes=nnodes, endpoint=f"{host}:{meeting.master_port}", is_host=listens, address=address)


def _endpoint(rendezvous: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{rendezvous}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host:
        raise LaunchError(f"The rendezvous is {rendezvous!r}; write host:port, such as node-0:{DEFAULT_PORT}.")
    return host, port or DEFAULT_PORT


def _is_here(host: str) -> bool:
    """Whether `host` names this host."""
    import psutil

    try:
        named = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    here = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    return bool(named & here) or any(is_loopback(address) for address in named)


def _start_method(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Literal["spawn", "fork"]:
    """`spawn` where a fresh interpreter can find the function by name, else `fork` where that is safe."""
    main = sys.modules["__main__"]
    interactive = fn.__module__ == "__main__" and not Path(getattr(main, "__file__", "")).is_file()
    if not interactive:
        try:
            pickle.dumps((fn, args, kwargs))
            return "spawn"
        except (pickle.PicklingError, AttributeError, TypeError):
            pass
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise LaunchError(
            f"{getattr(fn, '__qualname__', fn)} can only be copied to other processes together with this one, which "
            "already uses CUDA and then cannot be copied.",
            hint="Move the function to a module of its own and import it, or call launch() before anything uses a GPU.",
        )
    if "fork" not in multiprocessing.get_all_start_methods():
        raise LaunchError(
            f"{getattr(fn, '__qualname__', fn)} cannot be found by other processes.",
            hint="Move the function to a module of its own and import it.",
        )
    return "fork"


def _rank(call: Any, parent: int, threads: int | None) -> bytes:
    """The life of a rank that runs a function."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the launcher
        if os.getppid() != parent:
            raise SystemExit(1)
    os.setsid()  # Ctrl-C in the terminal reaches the launcher alone, which passes it on once
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    with reported_failures():
        fn, args, kwargs = _found(call) if isinstance(call, bytes) else call
        return pickle.dumps(fn(*args, **kwargs))
    raise AssertionError("reported_failures() lets nothing pass in silence")


def _found(call: bytes) -> Any:
    try:
        return pickle.loads(call)  # written by launch() in the process that started this one
    except (AttributeError, ImportError) as exc:
        raise LaunchError(
            f"A fresh interpreter does not find the function or an argument: {exc}.",
            hint='Define it at the top of its file, and outside of `if __name__ == "__main__":`.',
        ) from exc
