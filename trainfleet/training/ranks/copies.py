"""Ranks as copies of a process that has imported everything (preload.py): how the launcher starts and watches them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from trainfleet.training.ranks import preload

CAN_COPY = sys.platform == "linux"
"""Elsewhere ranks are fresh interpreters: libraries forbid forks there, and no kernel knows of dying with a parent."""

_IMPORTS_WITHIN_SECONDS = 300.0
_COPIES_WITHIN_SECONDS = 15.0
_LOOKS_EVERY_SECONDS = 0.01


class NoCopies(Exception):
    """There is nothing to copy; ranks have to be fresh interpreters this time. The message says why."""


class Preloaded:
    """A process that imports `modules` while the launcher does other things, and of which copies are made then.

    `threads` is each rank's share of the cores, for all libraries that read OMP_NUM_THREADS when they are imported.
    """

    def __init__(self, modules: Sequence[str], *, threads: int | None) -> None:
        self._modules, self._threads = tuple(modules), threads
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_ready = False
        if CAN_COPY:
            self._start()

    def copy(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], *, name: str) -> Copy:
        """A new process of this one that runs `python -m module arguments`. Raises NoCopies."""
        if not CAN_COPY:
            raise NoCopies("this system copies no processes")
        if self._process is None or self._process.poll() is not None:
            self._start()  # somebody has killed it; one that imports is no slower than ranks that do
        try:
            self._await_ready()
            with _children_of_children():
                return self._copied(module, arguments, environment, name)
        except (OSError, ValueError) as exc:
            self.close()
            raise NoCopies(f"the process to be copied did not answer ({type(exc).__name__}: {exc})") from exc

    def close(self) -> None:
        """End the process; its copies go on."""
        if self._process is not None and self._control is not None:
            self._control.close()
            self._process.kill()
            self._process.wait()
        self._process = self._control = None

    def __enter__(self) -> Preloaded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self.close()
        environment = dict(os.environ)
        if self._threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._threads)
        self._control, theirs = socket.socketpair()
        with theirs:
            words = [preload.__name__, str(theirs.fileno()), str(os.getpid()), *self._modules]
            self._process = subprocess.Popen(
                [sys.executable, "-m", *words],
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the launcher
            )
        self._is_ready = False

    def _await_ready(self) -> None:
        if self._is_ready:
            return
        assert self._control is not None
        self._control.settimeout(_IMPORTS_WITHIN_SECONDS)
        if self._control.recv(len(preload.READY), socket.MSG_WAITALL) != preload.READY:
            raise ConnectionError("it has ended")
        self._control.settimeout(_COPIES_WITHIN_SECONDS)
        self._is_ready = True

    def _copied(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], name: str) -> Copy:
        assert self._control is not None
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                socket.send_fds(self._control, [b"c"], [theirs.fileno()])
            ours.settimeout(_COPIES_WITHIN_SECONDS)
            with ours.makefile("rb") as answers:
                copy = Copy(int(answers.readline()))
            order = {"module": module, "arguments": list(arguments), "environment": dict(environment), "name": name}
            ours.sendall(json.dumps(order).encode())
        return copy


class Copy:
    """A child of this process that `subprocess` has not started, with what is used of a `Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        try:
            self.poll()
        except ChildProcessError as exc:
            raise ConnectionError(f"process {pid} is no child of this one") from exc

    def poll(self) -> int | None:
        """The exit code once it has ended, minus the signal where one ended it."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code; subprocess.TimeoutExpired after that many seconds."""
        ends = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() >= ends:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(_LOOKS_EVERY_SECONDS)
        return code


@contextmanager
def _children_of_children() -> Iterator[None]:
    """While open, processes below this one whose parent ends become children of this one."""
    if not preload.prctl(preload.PR_SET_CHILD_SUBREAPER, 1):
        raise OSError("the kernel gives no children of children")
    try:
        yield
    finally:
        preload.prctl(preload.PR_SET_CHILD_SUBREAPER, 0)
