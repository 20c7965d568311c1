"""The process that ranks of this host are copied from: it has imported all they need, so a start costs no imports.

    launcher ── starts ──> this process ── forks, and forks again ──> a rank

The process in between ends at once, and the kernel gives the rank to the launcher, which has asked for the children
of its children. So a rank is the launcher's own child, as one that is a fresh interpreter: the launcher waits for it
and signals it, and the kernel kills it when the launcher dies. What becomes of this process is nothing to a rank.

It keeps to one thread and touches no GPU, for only then a copy is sound; it ends where an import has done otherwise.
The launcher's side is copies.py.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

READY = b"ready"
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36
_WITH_THE_LAUNCHER_SECONDS = 10.0


def main(control: int, launcher: int, modules: Sequence[str]) -> None:
    """Import, then make copies as `launcher` asks for them at the socket `control`, until it has gone.

    A request carries a socket, on which the copy says its process id and hears what to run. Returns only in a copy,
    when it has run that.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(1)
    hears_ctrl_c = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    if hears_ctrl_c:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback of this process; a copy takes it back
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # or the collector would write to memory that the copies share
    # A first fork, for libraries that know of forks: OpenBLAS ends its threads before one, until they are needed again.
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    with socket.socket(fileno=control) as asked:
        line = _copied(asked)
    order = _order(line, launcher)
    if hears_ctrl_c:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _run(order)


def prctl(option: int, value: int | bytes) -> bool:
    """Ask the kernel; whether it agreed."""
    argument = value if isinstance(value, bytes) else ctypes.c_ulong(value)
    return bool(ctypes.CDLL(None).prctl(option, argument, 0, 0, 0) == 0)


def _copied(asked: socket.socket) -> socket.socket:
    """Make copies; in a copy, return the socket that came with the request."""
    if _is_alone():
        asked.sendall(READY)
    while _is_alone():
        request, files, _, _ = socket.recv_fds(asked, 1, 1)
        if not request:
            break
        line = socket.socket(fileno=files[0])
        between = os.fork()
        if between == 0:
            if os.fork() != 0:
                os._exit(0)
            return line
        line.close()
        os.waitpid(between, 0)
    os._exit(0)


def _is_alone() -> bool:
    """Whether there is one thread: of others a copy would have the locks, and not what releases them."""
    return len(list(Path("/proc/self/task").iterdir())) == 1


def _order(line: socket.socket, launcher: int) -> dict[str, Any]:
    """In a copy: become the launcher's child, and hear what to run. Ends if the launcher has not kept the line."""
    ends = time.monotonic() + _WITH_THE_LAUNCHER_SECONDS
    while os.getppid() != launcher and time.monotonic() < ends:
        time.sleep(0.0005)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # also where it died before the kernel was asked
        os._exit(1)
    os.setsid()  # the launcher signals all that a rank has started; and Ctrl-C is for the launcher alone
    try:
        with line, line.makefile("rb") as heard:
            line.sendall(b"%d\n" % os.getpid())
            return dict(json.loads(heard.read()))
    except (OSError, ValueError):
        os._exit(1)


def _run(order: dict[str, Any]) -> None:
    """`python -m module arguments`, with the environment and the random numbers of a process of its own."""
    os.environ.clear()
    os.environ.update(order["environment"])
    prctl(PR_SET_NAME, order["name"].encode())
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()  # Python's own generator does so in every fork
    sys.argv = [order["module"], *order["arguments"]]
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
