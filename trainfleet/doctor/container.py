"""What the control groups of this process allow it: the limits of a container, a job of SLURM, a service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

OWN = Path("/proc/self/cgroup")
MOUNTED = Path("/sys/fs/cgroup")


def core_quota(own: Path = OWN, mounted: Path = MOUNTED) -> float | None:
    """Cores' worth of time a second, by the narrowest group; None where nothing limits it."""
    quotas = []
    for folder in _folders("cpu", own, mounted):
        numbers = _words(folder / "cpu.max") or [*_words(folder / "cpu.cfs_quota_us"), *_period(folder)]
        if len(numbers) == 2 and numbers[0].isdigit():  # `max` and -1: no limit
            quotas.append(int(numbers[0]) / int(numbers[1]))
    return min(quotas, default=None)


def memory_limit(own: Path = OWN, mounted: Path = MOUNTED) -> int | None:
    """Bytes, by the narrowest group."""
    return _least("memory", ("memory.max", "memory.limit_in_bytes"), own, mounted)


def process_limit(own: Path = OWN, mounted: Path = MOUNTED) -> int | None:
    """Processes and threads together, by the narrowest group."""
    return _least("pids", ("pids.max",), own, mounted)


def _least(controller: str, names: tuple[str, ...], own: Path, mounted: Path) -> int | None:
    limits = [
        int(words[0])
        for folder in _folders(controller, own, mounted)
        for name in names
        if (words := _words(folder / name)) and words[0].isdigit() and int(words[0]) < 1 << 60  # v1's word for none
    ]
    return min(limits, default=None)


def _folders(controller: str, own: Path, mounted: Path) -> Iterator[Path]:
    """Of our group and those above it, in version 2 and in version 1 of control groups."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = mounted / controllers if controllers else mounted
        if not controllers and not (root / "cgroup.controllers").exists() and (mounted / "unified").exists():
            root = mounted / "unified"
        group = root / path.lstrip("/")
        while True:  # a container may not see its own group by that name: then only the top is there
            yield group
            if group == root:
                break
            group = group.parent


def _period(folder: Path) -> list[str]:
    return _words(folder / "cpu.cfs_period_us")


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
