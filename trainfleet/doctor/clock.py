"""Whether the clocks of this machine can be trusted: deadlines go by the one, certificates and logs by the other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import trainfleet
from trainfleet.doctor.finding import Finding

AGREE_SECONDS = 2.0
"""File systems note times in whole seconds, some in two."""
DAY = 86_400.0
_SYNCHRONISE = "Let chrony or systemd-timesyncd set it (`timedatectl set-ntp true`); in a container, on its host."


def check_clock(folder: Path | None = None) -> Iterator[Finding]:
    """Both clocks over 50 ms, the wall clock against this installation and the disk of `folder`, and what NTP says."""
    wall = time.time()
    steady, drift = _compare()
    ahead = _ahead_of_disk(Path.cwd() if folder is None else folder)
    built = _built()
    ntp, off = _told_by_ntp()
    if not steady:
        fact, verdict = "the monotonic clock stands still or goes back: no deadline can be kept", "no"
    elif drift >= 0.02:
        fact, verdict = f"the wall clock jumped by {drift * 1000:,.0f} ms within 50 ms: it is being set", "note"
    elif wall < built - DAY:
        fact = f"it says {_date(wall)}, but this trainfleet was made on {_date(built)}: certificates seem not yet valid"
        verdict = "no"
    elif ahead is not None and abs(ahead) > AGREE_SECONDS:
        where = "behind" if ahead < 0 else "ahead of"
        fact = f"it is {abs(ahead):,.1f} s {where} that of the disk here: times of files and logs do not match"
        verdict = "note"
    elif off > AGREE_SECONDS:
        fact, verdict = f"it is {off:,.1f} s off the time of NTP ({ntp})", "note"
    else:
        yield Finding(subject="clock", fact="; ".join(filter(None, ("steady", _date(wall), ntp))))
        return
    yield Finding(subject="clock", fact=fact, verdict="no" if verdict == "no" else "note", remedy=_SYNCHRONISE)


def _compare() -> tuple[bool, float]:
    """Whether the monotonic clock always rises, and by how many seconds both differ after a twentieth of one."""
    first, ticks = _apart(), []
    for _ in range(10):
        time.sleep(0.005)
        ticks.append(time.monotonic())
    steady = all(after > before for before, after in pairwise(ticks))
    return steady, abs(_apart() - first)


def _apart() -> float:
    """Wall clock minus monotonic clock: of five readings the one that was interrupted least."""
    readings = []
    for _ in range(5):
        before, wall, after = time.monotonic(), time.time(), time.monotonic()
        readings.append((after - before, wall - before))
    return min(readings)[1]


def _ahead_of_disk(folder: Path) -> float | None:
    """Seconds, against the time that the disk's own host gives to a file; None where none can be made."""
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".trainfleet-doctor-") as file:
            file.write(b"now")
            file.flush()
            before = time.time()
            return before - os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _built() -> float:
    """When the newest file of this installation was made, by whoever made it."""
    folder = Path(trainfleet.__file__).parent
    return max(path.stat().st_mtime for path in folder.glob("*.py"))


def _told_by_ntp() -> tuple[str, float]:
    """What chrony knows, or systemd, and the seconds we are off as far as that tells; nothing where none answers."""
    for command, wanted in ((["chronyc", "-n", "tracking"], "System time"), (_TIMEDATECTL, "NTPSynchronized")):
        if shutil.which(command[0]) is None:
            continue
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=1)
        except (OSError, subprocess.TimeoutExpired):
            continue
        for line in said.stdout.splitlines():
            if line.startswith(wanted):
                off = re.search(r"(\d+\.\d+) seconds", line)
                return " ".join(line.replace("=", ": ").split()), float(off[1]) if off else 0.0
    return "", 0.0


_TIMEDATECTL = ["timedatectl", "show", "-p", "NTPSynchronized"]


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
