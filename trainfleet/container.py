"""What this process may have of its machine: the limits of a container, a job of SLURM, a service (cgroups 1 and 2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

_OWN = Path("/proc/self/cgroup")
_MOUNTED = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60
"""Version 1 says the largest number there is."""
_MEMORY = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def usable_cores() -> int:
    """Those that this process may run on, or as many as it has the time of, where that is less; at least 1."""
    cores, quota = allowed_cores(), core_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def allowed_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_quota() -> float | None:
    """Cores' worth of time a second, by the narrowest group; None where nothing limits it."""
    quotas = []
    for folder in _folders("cpu"):
        words = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and all(map(str.isdigit, words)) and int(words[1]):  # `max` and -1: no limit
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def process_limit() -> int | None:
    """Processes and threads together, by the narrowest group; None where nothing limits them."""
    limits = [limit for folder in _folders("pids") if (limit := _number(folder / "pids.max")) is not None]
    return min(limits, default=None)


def memory_limit() -> int | None:
    """Bytes, by the narrowest group; None where nothing limits them."""
    limits = [limit for folder, (name, _) in _limited(os.getpid()) if (limit := _number(folder / name)) is not None]
    return min(limits, default=None)


def memory_left() -> int | None:
    """Bytes until the first group is at its limit; None where nothing limits them.

    Pages of files count as left: they are given up when memory is needed.
    """
    left = []
    for folder, names in _limited(os.getpid()):
        limit, used = (_number(folder / name) for name in names)
        if limit is not None:
            left.append(max(0, min(limit, limit - (used or 0) + _cached_bytes(folder))))
    return min(left, default=None)


@lru_cache(maxsize=1)
def _limited(process: int) -> tuple[tuple[Path, tuple[str, str]], ...]:
    """Folders that had a limit of memory when this process first asked: to look everywhere takes a millisecond."""
    return tuple(
        (folder, names)
        for folder in dict.fromkeys(_folders("memory"))
        for names in _MEMORY
        if _number(folder / names[0]) is not None
    )


def _folders(controller: str) -> Iterator[Path]:
    """Of our group and those above it, in version 2 and in version 1. A container may not see its own by its name: then
    the one at the top is it."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        root = _root(controllers)
        group = PurePosixPath(path.lstrip("/"))
        if ".." in group.parts:
            group = PurePosixPath()
        yield from (root / each for each in [group, *group.parents])


def _root(controllers: str) -> Path:
    root = _MOUNTED / controllers if controllers else _MOUNTED
    is_mixed = not controllers and not (root / "cgroup.controllers").exists() and (_MOUNTED / "unified").exists()
    return _MOUNTED / "unified" if is_mixed else root


def _cached_bytes(folder: Path) -> int:
    words = _words(folder / "memory.stat")
    stat = dict(zip(words[::2], words[1::2]))
    text = stat.get("total_inactive_file", stat.get("inactive_file", "0"))
    return int(text) if text.isdigit() else 0


def _number(path: Path) -> int | None:
    """None where there is no such file, or no limit in it."""
    words = _words(path)
    number = int(words[0]) if words and words[0].isdigit() else None
    return None if number is None or number >= _NO_LIMIT else number


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []
