"""A process beside rank 0 that says which rank failed first, when mpiexec has already ended all of them.

Hydra, MPICH's mpiexec, kills the survivors of a dead rank before they can speak. Each rank holds a line to this
process; the line that breaks first without a last word is that of the rank that died.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import selectors
import socket
import stat
import subprocess
import sys
import termios
import threading
import time
from array import array
from contextlib import suppress
from typing import Any

from trainfleet.comm.group import Group

_MEET_SECONDS = 30.0
_LAST_WORD_SECONDS = 1.0
_READ_SECONDS = 0.5


class Watchdog:
    """This rank's line to the process beside rank 0."""

    def __init__(self, group: Group) -> None:
        """Rank 0 starts the process; all ranks call this. On one host it listens on loopback."""
        hosts = group.exchange(socket.gethostname())
        told: dict[str, Any] = {}
        if group.rank == 0:
            told = _start(group.size, "127.0.0.1" if len(set(hosts)) == 1 else hosts[0])
        told = group.exchange(told)[0]
        self._line = socket.create_connection((told["address"], told["port"]), timeout=_MEET_SECONDS)
        # The secret tells our ranks from strangers that found the port.
        self._say(rank=group.rank, pid=os.getpid(), host=hosts[group.rank], secret=told["secret"])

    def tell(self, error: BaseException) -> None:
        """The last word of a rank that fails; returns when it has been said aloud."""
        self._say(error=f"{type(error).__name__}: {error}")
        self._line.settimeout(_LAST_WORD_SECONDS)
        with suppress(OSError):
            self._line.recv(1)
        self._line.close()

    def end_well(self) -> None:
        self._say(end="well")
        self._line.close()

    def _say(self, **words: Any) -> None:
        with suppress(OSError):  # it is there to help, and its loss harms nothing
            self._line.sendall(json.dumps(words).encode() + b"\n")


def _start(size: int, address: str) -> dict[str, Any]:
    secret = secrets.token_hex(16)
    # A session of its own: mpiexec kills the group of its processes.
    helper = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import watch; watch({size}, {address!r})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    # Whenever it ends, nothing of it is left; nobody waits for this thread.
    threading.Thread(target=helper.wait, name="watchdog", daemon=True).start()
    assert helper.stdin is not None and helper.stdout is not None
    with helper.stdin as writing:
        writing.write(secret)
    with helper.stdout as reading:
        return {"address": address, "port": int(reading.readline()), "secret": secret}


def watch(size: int, address: str) -> None:
    """The life of the process: wait for `size` ranks, then until the last line has ended."""
    secret = sys.stdin.read()
    with socket.create_server((address, 0)) as listener, selectors.DefaultSelector() as selector:
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.close()
        _watch(listener, selector, size, secret)


def _watch(listener: socket.socket, selector: selectors.BaseSelector, size: int, secret: str) -> None:
    heard: dict[socket.socket, bytes] = {}
    who: dict[socket.socket, str] = {}
    num_ended = 0
    selector.register(listener, selectors.EVENT_READ)
    meets_until = time.monotonic() + _MEET_SECONDS
    while num_ended < size and (who or time.monotonic() < meets_until):
        for key, _ in selector.select(0.1):  # in the order in which they became ready
            line = key.fileobj
            assert isinstance(line, socket.socket)
            if line is listener:
                line, _ = listener.accept()
                selector.register(line, selectors.EVENT_READ)
                heard[line] = b""
                continue
            try:
                data = line.recv(65536)
            except OSError:
                data = b""
            heard[line] = (heard[line] + data)[-1_000_000:]
            word = None if data else "died"
            while b"\n" in heard[line]:
                text, _, heard[line] = heard[line].partition(b"\n")
                said = _parsed(text)
                if line not in who and said.get("secret") == secret:
                    who[line] = f"Rank {said['rank']} of {size} (process {said['pid']} on {said['host']})"
                elif line in who:
                    word = "" if said.get("end") else str(said.get("error"))
            if word is None:
                continue
            if line in who:
                num_ended += 1
                rank = who.pop(line)
                if word:
                    report(rank, word)
                    line.close()  # whoever told an error waits for this
                    return
            selector.unregister(line)
            line.close()


def report(rank: str, word: str) -> None:
    """The sentence about the rank that failed first."""
    if word == "died":
        sentence = f"{rank} died without a word, and mpiexec ends the others."
        sentence += " Killed for its memory? `dmesg` or your scheduler's log says so."
    else:
        sentence = f"{rank} failed first: {word}"
    sys.stderr.write(f"trainfleet: {sentence}\n")
    sys.stderr.flush()
    _wait_until_read(sys.stderr.fileno())


def _wait_until_read(pipe: int) -> None:
    """Return once the other end has read all of `pipe`: mpiexec drops what it has not read when a rank aborts."""
    if not stat.S_ISFIFO(os.fstat(pipe).st_mode):
        return
    unread = array("i", [1])
    until = time.monotonic() + _READ_SECONDS
    while unread[0] and time.monotonic() < until:
        time.sleep(0.002)
        fcntl.ioctl(pipe, termios.FIONREAD, unread)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        word = json.loads(line)
    except ValueError:
        return {}
    return word if isinstance(word, dict) else {}
