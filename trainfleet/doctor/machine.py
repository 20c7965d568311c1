"""What this machine can do: one check after the other, each a finding with its remedy."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from trainfleet import container
from trainfleet.doctor.finding import Finding

GIB = 1 << 30
FEWEST_FILES = 1024
"""What a rank with 8 data workers, 64 connections and its checkpoints may need, twice."""
FEWEST_PROCESSES = 512
"""Ranks, data workers and their threads count alike."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Check = Callable[[], Iterator[Finding]]


def check_python() -> Iterator[Finding]:
    version = platform.python_version()
    supported = (3, 10) <= sys.version_info < (3, 14)
    yield Finding(
        subject="Python",
        fact=f"{version} ({sys.executable})",
        verdict="ok" if supported else "no",
        remedy="" if supported else "Use Python 3.10 to 3.13.",
    )
    tested = sys.platform == "linux"
    yield Finding(
        subject="platform",
        fact=platform.platform(),
        verdict="ok" if tested else "note",
        remedy="" if tested else "trainfleet is tested on Linux.",
    )


def check_processor(variables: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Cores, the quota of a container, and variables that ask for more threads than there are cores."""
    import psutil

    allowed, cores, quota = container.allowed_cores(), container.usable_cores(), container.core_quota()
    limited = quota is not None and quota < allowed
    yield Finding(
        subject="cores",
        fact=f"{allowed} usable, {psutil.cpu_count(logical=False) or '?'} physical"
        + (f", but this container may use the time of {quota:g}" if limited else ""),
        verdict="note" if limited else "ok",
        remedy=f"Start no more than {cores} process{'es' * (cores > 1)}, with OMP_NUM_THREADS=1, or raise the limit "
        "(docker --cpus, resources.limits.cpu of Kubernetes)."
        if limited
        else "",
    )
    for name in _THREADS:
        value = variables.get(name, "").strip()
        first = value.split(",")[0]
        if value and not (first.isdigit() and int(first) > 0):
            fact = f"{name}={value!r} is no number of threads, and is ignored"
            yield Finding(subject="threads", fact=fact, verdict="note", remedy=f"unset {name}, or {name}={cores}")
        elif value and int(first) > cores:
            fact = f"{name}={value} asks each process for {first} threads on {cores} core{'s' * (cores > 1)}: they "
            fact += "take turns, and steps become slower than with one"
            remedy = f"unset {name} (each rank then takes cores / ranks), or export {name}={cores}"
            yield Finding(subject="threads", fact=fact, verdict="note", remedy=remedy)


def check_memory() -> Iterator[Finding]:
    import psutil

    memory, limit, left = psutil.virtual_memory(), container.memory_limit(), container.memory_left()
    free = memory.available if left is None else min(memory.available, left)
    yield Finding(
        subject="memory",
        fact=f"{_gib(memory.total)} GiB, {_gib(free)} GiB free"
        + (f", this container may use {_gib(limit)} GiB" if limit and limit < memory.total else ""),
        verdict="ok" if free >= 2 * GIB else "note",
        remedy="" if free >= 2 * GIB else "A process with torch takes about 0.3 GiB before it holds a model.",
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        yield Finding(
            subject="shared memory",
            fact=f"{_gib(free)} GiB free in /dev/shm",
            verdict="ok" if free >= GIB else "note",
            remedy="" if free >= GIB else "Data workers pass batches there; in a container add --shm-size=8g.",
        )


def check_limits() -> Iterator[Finding]:
    """Of open files and of processes, by ulimit and by the container."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _unlimited(soft)
    could = hard if _unlimited(hard) is not None else "any number"
    enough = files is None or files >= FEWEST_FILES
    yield Finding(
        subject="open files",
        fact=f"at most {files or 'any number'} a process" + ("" if enough else f" (could be {could})"),
        verdict="ok" if enough else "note",
        remedy=""
        if enough
        else f"ulimit -n {min(_unlimited(hard) or 65536, 65536)}, before `trainfleet train`: ranks, data workers and "
        "connections each hold some. For good: LimitNOFILE of the service, or /etc/security/limits.conf.",
    )
    limits = [_unlimited(resource.getrlimit(resource.RLIMIT_NPROC)[0]), container.process_limit()]
    processes = min((limit for limit in limits if limit is not None), default=None)
    few = processes is not None and processes < FEWEST_PROCESSES
    yield Finding(
        subject="processes",
        fact=f"at most {processes or 'any number'}, threads included",
        verdict="note" if few else "ok",
        remedy=f"ulimit -u {8 * FEWEST_PROCESSES}, or --pids-limit of the container: a rank alone has about 20 threads."
        if few
        else "",
    )


def check_network(variables: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Loopback, our own name, and the interfaces that variables name."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        yield Finding(subject="loopback", fact=f"a port opens and answers ({port})")
    except OSError as error:
        remedy = "Ranks of one host meet there. `ip link set lo up` (root), then look at the firewall."
        yield Finding(subject="loopback", fact=f"no port of 127.0.0.1 answers: {error}", verdict="no", remedy=remedy)
    yield from _interface_variables(variables)
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        alone = ", which other hosts cannot reach: between hosts set GLOO_SOCKET_IFNAME"
        yield Finding(subject="host name", fact=f"{name} is {address}{alone if address.startswith('127.') else ''}")
    except OSError as error:
        yield Finding(
            subject="host name",
            fact=f"{name} does not resolve: {error}",
            verdict="note",
            remedy="Between hosts, gloo may choose a wrong interface: set GLOO_SOCKET_IFNAME, or add it to /etc/hosts.",
        )


def _interface_variables(variables: Mapping[str, str]) -> Iterator[Finding]:
    import psutil

    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        there = psutil.net_if_addrs()
        asked = [each.lstrip("=") for each in variables.get(name, "").split(",") if each and each[0] != "^"]
        prefixes = name.startswith("NCCL") and not variables.get(name, "").startswith("=")  # it takes `eth` for eth0
        missing = [each for each in asked if each not in there and not (prefixes and _begins(each, there))]
        if missing:
            fact = f"{name} names {', '.join(missing)}, which this host does not have"
            remedy = f"unset {name}, or name one of {', '.join(there)}."
            yield Finding(subject="interface", fact=fact, verdict="no", remedy=remedy)


def _begins(prefix: str, names: Mapping[str, object]) -> bool:
    return any(name.startswith(prefix) for name in names)


def _unlimited(limit: int) -> int | None:
    """None for what stands for no limit."""
    return None if limit < 0 or limit >= 1 << 62 else limit


def _gib(count: float) -> str:
    return f"{count / GIB:.1f}"
