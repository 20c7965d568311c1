"""Where a run is going to be written: room, names that are left, whether it can be written, and how fast."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from trainfleet.doctor.finding import Finding

GIB = 1 << 30
FEWEST_INODES = 10_000
"""A checkpoint of 64 ranks takes about 200 files, and pip's cache of a model thousands."""
CHUNK = 1 << 20
SLOW_BYTES_PER_SECOND = 20e6
"""Below it a checkpoint of a model of 100 million parameters (1.2 GB with AdamW) takes over a minute."""
TRIAL_SECONDS = 0.4
TRIAL_CHUNKS = 16


def check_disk(folder: Path | None = None, *, quick: bool = False) -> Iterator[Finding]:
    """Space, inodes and a real write, with its speed unless `quick`; `folder` is where we stand unless given."""
    folder = Path.cwd() if folder is None else folder
    written = _trial(folder, chunks=1 if quick else TRIAL_CHUNKS)
    free = shutil.disk_usage(folder).free
    if isinstance(written, OSError):
        yield Finding(
            subject="disk",
            fact=f"{folder} cannot be written: {_why(folder, written)}; {free / GIB:.1f} GiB free",
            verdict="no",
            remedy="Checkpoints need room: remove old runs, or name another `folder`."
            if written.errno in (errno.ENOSPC, errno.EDQUOT)
            else "Change to a folder of yours, or set `folder` to one: trainfleet train RECIPE folder=/PLACE/RUN",
        )
    else:
        yield Finding(
            subject="disk",
            fact=f"{free / GIB:.1f} GiB free in {folder}",
            verdict="no" if free < GIB // 4 else "ok" if free >= 5 * GIB else "note",
            remedy="" if free >= 5 * GIB else "Checkpoints need room: remove old runs, or name another `folder`.",
        )
    yield from _inodes(folder)
    if not quick and isinstance(written, float):
        slow = written < SLOW_BYTES_PER_SECOND
        yield Finding(
            subject="disk speed",
            fact=f"{written / 1e6:,.3g} MB/s in writes of 1 MiB that reach the disk (fsync)"
            + (f"; a checkpoint of 1 GB takes {1e9 / written:,.0f} s" if slow else ""),
            verdict="note" if slow else "ok",
            remedy="Set `folder` (or checkpoint.folder) to a faster disk, or raise checkpoint.every. `iostat -x 1` "
            "tells whether another program is writing."
            if slow
            else "",
        )


def _inodes(folder: Path) -> Iterator[Finding]:
    if not hasattr(os, "statvfs"):
        return
    stat = os.statvfs(folder)
    if stat.f_files and stat.f_favail < FEWEST_INODES:  # 0 in all: this file system has no such bound
        yield Finding(
            subject="inodes",
            fact=f"{stat.f_favail:,} of {stat.f_files:,} names of files are left here, whatever space is free",
            verdict="no" if stat.f_favail < FEWEST_INODES // 10 else "note",
            remedy="Remove many small files (caches, samples): du --inodes -x . | sort -n | tail; or set another "
            "`folder`.",
        )


def _trial(folder: Path, *, chunks: int) -> float | OSError:
    """Bytes a second of some writes, each waited for until it is on the disk; what stood in the way otherwise."""
    payload = os.urandom(CHUNK)  # a file system that compresses gains nothing
    seconds = 0.0
    done = 0
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".trainfleet-doctor-") as file:
            while done < chunks and seconds < TRIAL_SECONDS:
                begun = time.perf_counter()
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
                seconds += time.perf_counter() - begun
                done += 1
    except OSError as error:
        return error
    return done * CHUNK / seconds


def _why(folder: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno == errno.EROFS or (hasattr(os, "statvfs") and os.statvfs(folder).f_flag & os.ST_RDONLY):
        return f"{reason}: its file system is mounted read-only"
    return reason
