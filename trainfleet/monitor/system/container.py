"""How much memory the container of this process may have, where it is in one (cgroups, version 1 and 2)."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path, PurePosixPath

_ROOT = Path("/sys/fs/cgroup")
_GROUPS = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60
"""Version 1 says the largest number there is."""


def memory_limit_bytes() -> tuple[int, int] | None:
    """(the limit, what is left of it) of the tightest group this process is in; None without a limit.

    Pages of files count as left: they are given up when memory is needed.
    """
    found: list[tuple[int, int]] = []
    for folder, names in _limited(os.getpid()):
        limit, used = (_number(folder / name) for name in names)
        if limit is not None and limit < _NO_LIMIT:
            left = limit - (used or 0) + _cached_bytes(folder)
            found.append((limit, max(0, min(limit, left))))
    return min(found, key=lambda each: each[1], default=None)


@lru_cache(maxsize=1)
def _limited(process: int) -> tuple[tuple[Path, tuple[str, str]], ...]:
    """The folders that had a limit when this process first asked: to look everywhere takes a millisecond."""
    return tuple(
        (folder, names)
        for folder, names in _folders()
        if (limit := _number(folder / names[0])) is not None and limit < _NO_LIMIT
    )


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_V2 = ("memory.max", "memory.current")


def _folders() -> list[tuple[Path, tuple[str, str]]]:
    """Those of this process's group and of the groups it is in. A container sees its own group as the root."""
    try:
        lines = _GROUPS.read_text().splitlines()
    except OSError:
        lines = []
    folders: list[tuple[Path, tuple[str, str]]] = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (_ROOT / "memory", _V1) if controllers else (_ROOT, _V2)
        group = PurePosixPath(path.lstrip("/"))
        if ".." not in group.parts:
            folders += [(root / each, names) for each in [group, *group.parents]]
    return list(dict.fromkeys([*folders, (_ROOT, _V2)]))


def _cached_bytes(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    stat = dict(line.partition(" ")[::2] for line in lines)
    text = stat.get("total_inactive_file", stat.get("inactive_file", "0"))
    return int(text) if text.isdigit() else 0


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # none such, or `max`
        return None
