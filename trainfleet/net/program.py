"""A program of the system that runs for as long as we do, and of which we read what it says."""

from __future__ import annotations

import ctypes
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence

from trainfleet.errors import DependencyError, PeerError

logger = logging.getLogger(__name__)

_LINE_BYTES = 4096
_LAST_LINES = 20
_END_SECONDS = 5.0


class Program:
    """Started at once; ends with `close`, and with our process however that ends (on Linux)."""

    def __init__(self, command: Sequence[str], *, remedy: str, noise: tuple[str, ...] = ()) -> None:
        """DependencyError with `remedy` where there is no such program. `noise`: how lines begin that say nothing."""
        self.name = command[0]
        if shutil.which(command[0]) is None:
            raise DependencyError(f"There is no {command[0]} on this host.", hint=remedy)
        self._command, self._noise = command, noise
        self._said: deque[str] = deque(maxlen=_LAST_LINES)
        self._heard = threading.Condition()
        self._found: re.Match[str] | None = None
        self._pattern: re.Pattern[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self._closing = False
        self.has_ended = threading.Event()
        # Linux ends the program with the thread that started it, so that thread is the one that reads it to the end.
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"read {self.name}")
        self._thread.start()

    def find(self, pattern: str, seconds: float) -> re.Match[str]:
        """What it says that `pattern` matches; PeerError with its last words if it ends or says nothing such in time.

        To be asked once. The program goes on only where it is found.
        """
        ends = time.monotonic() + seconds
        with self._heard:
            self._pattern = re.compile(pattern)
            for line in self._said:
                self._found = self._found or self._pattern.search(line)
            while self._found is None and not self.has_ended.is_set() and self._heard.wait(ends - time.monotonic()):
                continue
            found, ended = self._found, self.has_ended.is_set()
        if found is not None:
            return found
        self.close()
        when = "ended" if ended else f"was not ready within {seconds:g} s"
        raise PeerError(f"{self.name} {when}: {self.last_words}")

    @property
    def last_words(self) -> str:
        """What it said last that may explain something."""
        with self._heard:
            lines = [line for line in self._said if line and not line.startswith(self._noise)]
        if self._error is not None:
            return f"{self._error.strerror}."
        return lines[-1] if lines else "it said nothing."

    @property
    def is_running(self) -> bool:
        return not self.has_ended.is_set()

    def close(self) -> None:
        """End it, and read it to the end. May be called twice."""
        with self._heard:
            self._closing = True
            while self._process is None and not self.has_ended.is_set():
                self._heard.wait()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._thread.join()

    def _run(self) -> None:
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def die_with_parent() -> None:
            if libc is not None:
                libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

        try:
            # A session of its own: Ctrl-C is ours to pass on.
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )
        except OSError as exc:
            with self._heard:
                self._error = exc
                self.has_ended.set()
                self._heard.notify_all()
            return
        with self._heard:
            self._process = process
            self._heard.notify_all()
        assert process.stdout is not None
        with process.stdout as output:
            while line := output.readline(_LINE_BYTES):
                self._hear(line.decode("utf-8", "replace").strip())
        process.wait()
        with self._heard:
            self.has_ended.set()
            lost = self._found is not None and not self._closing
            self._heard.notify_all()
        if lost:
            logger.warning("%s has ended, and nobody can come in that way any more: %s", self.name, self.last_words)

    def _hear(self, line: str) -> None:
        logger.debug("%s: %s", self.name, line)
        with self._heard:
            self._said.append(line)
            if self._pattern is not None and self._found is None:
                self._found = self._pattern.search(line)
                if self._found is not None:
                    self._heard.notify_all()
