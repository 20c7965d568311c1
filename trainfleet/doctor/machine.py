"""What this machine can do: one check after the other, each a finding with its remedy."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import pairwise
from pathlib import Path

from trainfleet.deps import installed
from trainfleet.doctor.finding import Finding

GIB = 1 << 30


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


def check_processor() -> Iterator[Finding]:
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cores()
    limited = quota is not None and quota < usable
    yield Finding(
        subject="cores",
        fact=f"{usable} usable, {psutil.cpu_count(logical=False) or '?'} physical"
        + (f", but this container may use {quota:g}" if limited else ""),
        verdict="note" if limited else "ok",
        remedy="Start no more processes than that, with OMP_NUM_THREADS=1." if limited else "",
    )


def check_memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    free = min(memory.available, limit or memory.available)
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


def check_disk() -> Iterator[Finding]:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    remedy = "" if free >= 5 * GIB else "Checkpoints need room: remove old runs, or name another `folder`."
    yield Finding(
        subject="disk",
        fact=f"{_gib(free)} GiB free here" + ("" if writable else ", but this folder cannot be written"),
        verdict="no" if free < GIB // 4 or not writable else "ok" if free >= 5 * GIB else "note",
        remedy=remedy if writable else "Change to a folder of yours, or set `folder` to one.",
    )


def check_limits() -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= 1024 or soft == resource.RLIM_INFINITY
    yield Finding(
        subject="open files",
        fact=f"at most {soft} a process (could be {hard})",
        verdict="ok" if enough else "note",
        remedy="" if enough else "ulimit -n 4096, before many data workers or ranks.",
    )


def check_network() -> Iterator[Finding]:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        yield Finding(subject="loopback", fact=f"a port opens and answers ({port})")
    except OSError as error:
        remedy = "Ranks of one host meet there; look at the firewall and at `ip link show lo`."
        yield Finding(subject="loopback", fact=f"no port of 127.0.0.1 answers: {error}", verdict="no", remedy=remedy)
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


def check_clock() -> Iterator[Finding]:
    """Deadlines use the monotonic clock, checkpoints and logs the wall clock; both must agree on a short time."""
    walls, ticks = [time.time()], [time.monotonic()]
    for _ in range(10):
        time.sleep(0.005)
        walls.append(time.time())
        ticks.append(time.monotonic())
    steady = all(b > a for a, b in pairwise(ticks))
    drift = abs((walls[-1] - walls[0]) - (ticks[-1] - ticks[0]))
    yield Finding(
        subject="clock",
        fact=("steady" if steady else "the monotonic clock stands still") + f", {drift * 1000:.1f} ms apart in 50 ms",
        verdict="no" if not steady else "ok" if drift < 0.02 else "note",
        remedy="" if steady and drift < 0.02 else "The clock is being set right now; look at chrony, ntpd or the host.",
    )


def check_extras() -> Iterator[Finding]:
    """What the optional parts of this installation need, as its own metadata tells."""
    try:
        requirements = metadata.requires("trainfleet") or []
    except metadata.PackageNotFoundError:
        yield Finding(subject="extras", fact="unknown: trainfleet is not installed, only imported", verdict="note")
        return
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", requirement)
        if match and match[2] not in ("torch", "test", "check", "bench"):
            extras.setdefault(match[2], []).append(match[1])
    for extra, names in extras.items():
        missing = [name for name in names if installed(name) is None and _version(name) is None]
        versions = [f"{name} {_version(name) or installed(name)}" for name in names if name not in missing]
        yield Finding(
            subject=f"extra {extra}",
            fact=", ".join([*versions, *(f"{name} is missing" for name in missing)]),
            verdict="note" if missing else "ok",
            remedy=f'pip install "trainfleet[{extra}]"' if missing else "",
        )


CHECKS: tuple[Check, ...] = (
    check_python,
    check_processor,
    check_memory,
    check_disk,
    check_limits,
    check_network,
    check_clock,
    check_extras,
)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cgroup_cores() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # `max`, or no such limit
        return None


def _gib(count: float) -> str:
    return f"{count / GIB:.1f}"
