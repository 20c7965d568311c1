"""What a test leaves behind: threads and open sockets that were not there before."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def open_sockets() -> set[str]:
    """The sockets of this process, by inode, such as `socket:[4711]`."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(str(entry.readlink()))
        except FileNotFoundError:  # the descriptor of this listing
            continue
    return {name for name in found if name.startswith("socket:")}


@contextmanager
def nothing_left_behind(seconds: float = 3.0) -> Iterator[None]:
    """Fails if, after `seconds` at most, the block has left a thread or an open socket."""
    threads, sockets = set(threading.enumerate()), open_sockets()
    yield
    ends = time.monotonic() + seconds
    while True:
        gc.collect(0)
        more = [thread.name for thread in threading.enumerate() if thread not in threads]
        open_now = open_sockets() - sockets
        if not more and not open_now:
            return
        if time.monotonic() > ends:
            raise AssertionError(f"left behind: threads {more}, sockets {sorted(open_now)}")
        time.sleep(0.02)
