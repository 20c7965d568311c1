"""A command on a tether: `python -m trainfleet.launchers.tether [--grace SECONDS] -- COMMAND...`.

Whoever started it holds the other end of its standard input. The word `end` asks the command to end (SIGTERM), `kill`
kills it, and the end of the tether is `end` with a grace and then `kill`: nothing is left behind on a host whose
launcher is gone. One word reaches one process; a signal to a group or a container would reach the ranks twice.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

GRACE_SECONDS = 75.0
"""More than `trainfleet train` gives its ranks to save and to end."""


class Tether:
    """A process that ends with whoever holds the other end."""

    def __init__(self, command: Sequence[str], *, grace: float = GRACE_SECONDS) -> None:
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def die_with_parent() -> None:
            if libc is not None:
                libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

        # No standard input: every word on the tether is for us. A session of its own: Ctrl-C reaches us alone.
        self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent, start_new_session=True
        )
        self._grace = grace
        self._asked = False

    def wait(self) -> int:
        """The exit code of the command; 128 + signal if one killed it."""
        code = self._child.wait()
        return code if code >= 0 else 128 - code

    def end(self) -> None:
        """Ask for the end, and kill after the grace. Asking again changes nothing: it would kill ranks that save."""
        if self._asked:
            return
        self._asked = True
        self._child.terminate()
        timer = threading.Timer(self._grace, self._child.kill)
        timer.daemon = True
        timer.start()

    def listen(self, descriptor: int) -> None:
        """Obey the words that come, until no more can come."""
        words = b""
        while chunk := os.read(descriptor, 1024):
            words += chunk
            *lines, words = words.split(b"\n")
            for line in lines:
                if line.strip() == b"end":
                    self.end()
                elif line.strip() == b"kill":
                    self._child.kill()
        self.end()


def main(arguments: Sequence[str]) -> int:
    command, grace = list(arguments), GRACE_SECONDS
    if command[:1] == ["--grace"]:
        grace, command = float(command[1]), command[2:]
    command = command[1:] if command[:1] == ["--"] else command
    try:
        tether = Tether(command, grace=grace)
    except OSError as exc:
        sys.stderr.write(f"trainfleet: {command[0]!r} cannot be started: {exc.strerror}.\n")
        return 127
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: tether.end())
    threading.Thread(target=tether.listen, args=(0,), daemon=True, name="tether").start()
    return tether.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
