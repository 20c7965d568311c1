"""What the C library's own allocator has given out: an account of memory that torch has no part in."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

_NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
_libc = ctypes.CDLL(None)
needs_glibc = pytest.mark.skipif(
    not hasattr(_libc, "mallinfo2"), reason="only the C library of GNU (2.33 or newer) tells what it has given out"
)


class _Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _NAMES.split()]


def allocated_bytes() -> int:
    """Given out by malloc and not freed, by this process."""
    _libc.mallinfo2.restype = _Info
    info = _libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


class Measured(NamedTuple):
    peak: int
    end: int


def measure(step: Callable[[], object], *, times: int = 3, until: float = 0.0) -> Measured:
    """Bytes beyond those at its beginning, at the most and at the end of `step`; the highest of a few measurements.

    A thread looks at them every tenth of a millisecond, and misses what lives shorter, and more on a busy host: so it
    tries four times as often while it has not seen `until`.
    """
    found = [_measure(step) for _ in range(times)]
    while len(found) < 4 * times and max(each.peak for each in found) < until:
        found.append(_measure(step))
    return Measured(max(each.peak for each in found), min(each.end for each in found))


def _measure(step: Callable[[], object]) -> Measured:
    gc.collect()
    before = allocated_bytes()
    seen = [before]
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            seen.append(allocated_bytes())
            time.sleep(1e-4)

    looking = threading.Thread(target=look)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        looking.start()
        step()
        ended.set()
        looking.join()
    finally:
        ended.set()
        sys.setswitchinterval(interval)
    return Measured(max(seen) - before, allocated_bytes() - before)
