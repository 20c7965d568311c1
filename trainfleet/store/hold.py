"""Holding a folder for one run: a lock that the kernel lifts when all who have it are dead, and whose it is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import shlex
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path

from trainfleet.errors import StoreError

HOLD = ".held"
"""The file that bears the lock. It is no stored name, and stays when nobody holds."""

_held: weakref.WeakSet[FileHold] = weakref.WeakSet()
_PAUSE_SECONDS = 0.05
_MOST_BYTES = 2000


class FileHold:
    """A lock on the file HOLD in `folder`, which says whose it is."""

    _descriptor: int | None = None

    def __init__(self, folder: Path, patience: timedelta) -> None:
        self._descriptor = os.open(folder / HOLD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._lock(self._descriptor, folder, time.monotonic() + patience.total_seconds())
            with contextlib.suppress(OSError):  # a full disk: then it cannot say whose it is
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, this_process().encode(errors="replace")[:_MOST_BYTES], 0)
        except BaseException:
            self.close()
            raise
        _let_go_in_children()
        _held.add(self)

    @staticmethod
    def _lock(descriptor: int, folder: Path, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    return  # a file system without locks: nothing can be said there
            if time.monotonic() > deadline:
                owner = os.pread(descriptor, _MOST_BYTES, 0).decode(errors="replace") or "somebody"
                raise StoreError(
                    f"{folder} is in use by {owner}.",
                    hint="Wait for it, end it, or give this run another folder.",
                )
            time.sleep(_PAUSE_SECONDS)

    @property
    def descriptor(self) -> int | None:
        return self._descriptor

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


def holder(folder: Path) -> str | None:
    """Who has taken `folder`, in words; None where nobody has, or where it cannot be known. Nothing is written.

    It is tried for a moment, shared with others who ask; who takes the folder just then tries again by itself.
    """
    try:
        descriptor = os.open(folder / HOLD, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # nobody ever took it, or it is not ours to read
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        return os.pread(descriptor, _MOST_BYTES, 0).decode(errors="replace") or "somebody"
    finally:
        os.close(descriptor)
    return None


@functools.cache
def _let_go_in_children() -> None:
    """A forked child, such as a worker that loads data, must not go on holding when this process is killed."""

    def let_go() -> None:
        for hold in list(_held):
            hold.close()

    os.register_at_fork(after_in_child=let_go)


def this_process() -> str:
    """This process in words, for whoever finds its hold."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {os.uname().nodename} since {since} ({shlex.join(sys.argv)[:500]})"
