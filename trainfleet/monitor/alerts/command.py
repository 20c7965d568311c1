"""The command of an alert: started without a shell, given a time, and never left as a zombie."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence

from trainfleet.monitor.alerts.facts import Facts
from trainfleet.monitor.alerts.settings import split_command

logger = logging.getLogger(__name__)

SHOWN_BYTES = 2_000
"""Of what the command prints, in the log."""


class Command:
    """Runs a command once for each alert, one after the other."""

    def __init__(self, text: str, *, shell: bool, timeout_seconds: float) -> None:
        self._words: Sequence[str] = ["/bin/sh", "-c", text] if shell else split_command(text)
        self._timeout_seconds = timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, facts: Facts) -> None:
        """Wait for its end, and log what it printed; OSError where it cannot be started, TimeoutError if it was killed.

        It gets no standard input. All of its process group is killed after its time.
        """
        began = time.monotonic()
        process = subprocess.Popen(
            [*self._end_by_itself(), *self._words],
            env={**os.environ, **facts.variables()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._process = process
        try:
            printed = _read(process, began + self._timeout_seconds)
            is_late = process.poll() is None
        finally:
            self.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
            self._process = None
        words = printed.decode(errors="replace").strip()
        said = f" It printed: {words}" if words else ""
        if is_late:
            raise TimeoutError(f"the command had not ended after {self._timeout_seconds:g} s, and was killed.{said}")
        level = logging.INFO if process.returncode == 0 else logging.WARNING
        logger.log(level, "The command of alert %r ended with %d.%s", facts.alert, process.returncode, said)

    def kill(self) -> None:
        """What is still there of the command under way; may be called from another thread."""
        if (process := self._process) is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def _end_by_itself(self) -> list[str]:
        """In front of the words: who ends the command in time if this process is killed before."""
        timeout = shutil.which("timeout")
        seconds = self._timeout_seconds + 5
        return [timeout, "-s", "KILL", f"{seconds:.3f}"] if timeout else []


def _read(process: subprocess.Popen[bytes], ends: float) -> bytes:
    """What it prints until it has ended or its time is over. Its children may hold the pipe for longer."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    os.set_blocking(descriptor, False)
    printed = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        is_open = True
        while time.monotonic() < ends:
            has_ended = process.poll() is not None  # before the last look: all that it printed is there then
            found = selector.select(0 if has_ended else 0.05) if is_open else []
            if not is_open and not has_ended:
                time.sleep(0.02)
            if found:
                chunk = os.read(descriptor, 1 << 16)
                is_open = bool(chunk)
                printed = (printed + chunk)[:SHOWN_BYTES]
                if not chunk:
                    selector.unregister(descriptor)
            elif has_ended:
                break
    return printed
