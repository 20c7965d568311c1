"""The writer: a process of its own that carries out saves, so that the loop shares neither lock nor core with them.

It is a fresh interpreter, not a copy of the rank: it has no torch and none of its threads, and it dies with the rank.
Orders and answers are JSON over a socket of the two, each behind its length in 8 bytes; the bytes of the arrays lie
in memory that both have mapped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from trainfleet.checkpoint.arrays import Bytes
from trainfleet.checkpoint.memory import CAN_BE_SHARED, StagingMemory, mapped
from trainfleet.checkpoint.order import Order, carry_out
from trainfleet.errors import CheckpointError
from trainfleet.store import open_store

logger = logging.getLogger(__name__)

CAN_RUN = CAN_BE_SHARED and bool(sys.executable)
"""Whether this system has what a writer process needs: Linux, and a Python to start."""

_END_SECONDS = 5.0
_NICE = 10  # it never takes a core from a rank at once, yet a tenth of one is left to it
_WATCH_SECONDS = 0.5  # between two looks for the parent, where it cannot be waited for
_LENGTH = struct.Struct("<Q")
_NOTHING: Bytes = np.empty(0, np.uint8)
_START = "import sys; sys.path[0] = sys.argv[1]; from trainfleet.checkpoint.writer import serve; serve(*sys.argv[2:])"


class WriterLost(CheckpointError):
    """The writer process died, or was late and ended; how far it came is not known."""


class Writer:
    """The writer process of one rank and one store. It is started with the first order, or by `start`."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[[subprocess.Popen[bytes], socket.socket], Writer] | None = None
        self._mapped = 0
        """The version of the memory that the process has mapped."""
        self._layout = 0
        """That of the last order, whose pieces the process need not be told again."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, hold: int | None) -> None:
        """Start the process; it shares the descriptor `hold` of the store, which is held until both are dead."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = [theirs.fileno(), *([] if hold is None else [hold])]
            root = str(Path(__file__).parents[2])
            command = [sys.executable, "-c", _START, root, str(theirs.fileno()), str(os.getpid()), self._address]
            try:
                # In a session of its own, the terminal's Ctrl-C and Ctrl-Z do not reach it, not even while it starts.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=descriptors,
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise CheckpointError(f"The process that writes checkpoints could not be started: {error}.") from error
        self._socket, self._mapped, self._layout = ours, 0, 0
        self._end = weakref.finalize(self, _end, self._process, ours)

    def write(self, order: Order, memory: StagingMemory, timeout: timedelta) -> None:
        """Have `order` carried out; CheckpointError with the reason if it fails.

        WriterLost where the process dies or is not done within `timeout`; it is ended, and `start` makes a new one.
        """
        assert self._socket is not None and self._process is not None
        try:
            self._socket.settimeout(timeout.total_seconds())
            new = memory.descriptor is not None and memory.version != self._mapped
            pieces = new or order.staged.layout != self._layout
            body = {**order.to_json(pieces=pieces), "memory_bytes": memory.num_bytes if new else None}
            _send(self._socket, body, memory.descriptor if new else None)
            self._mapped, self._layout = memory.version, order.staged.layout
            answer, _ = _receive(self._socket)
        except TimeoutError:
            self.close()
            raise WriterLost(
                f"Step {order.attempt.step} was not saved: its writer was not done after "
                f"{timeout.total_seconds():.0f} s and was ended. See whether the disk is slow or hangs."
            ) from None
        except (EOFError, OSError):
            how = _how_it_ended(self._process)
            self.close()
            raise WriterLost(
                f"Step {order.attempt.step} was not saved: its writer process {how}. The next save starts another."
            ) from None
        for warning in answer["warnings"]:
            logger.warning("%s", warning)
        if answer["error"] is not None:
            raise CheckpointError(answer["error"], hint=answer["hint"])

    def close(self) -> None:
        """End the process; a save under way ends with it."""
        end, self._end = self._end, None
        if end is not None:
            end()
        self._process = self._socket = None


def _end(process: subprocess.Popen[bytes], ours: socket.socket) -> None:
    with contextlib.suppress(OSError):
        ours.shutdown(socket.SHUT_RDWR)  # an idle writer ends at that, even if forked children share the socket
    ours.close()
    try:
        process.wait(_END_SECONDS if process.poll() is None and not _is_stopped(process.pid) else 0)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel may keep one that waits for a hung disk
            process.wait(_END_SECONDS)


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        return "went silent"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


# the process


def serve(descriptor: str, parent: str, address: str) -> None:
    """Carry out orders until the socket is closed. Runs in the writer process."""
    # A launcher may send these to all processes of a run: the rank decides when its saves are over.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _die_with(int(parent))
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    store = open_store(address)
    told = _Warnings()
    logging.getLogger("trainfleet").addHandler(told)
    memory = _NOTHING
    order: Order | None = None
    with socket.socket(fileno=int(descriptor)) as theirs, contextlib.suppress(EOFError, ConnectionError):
        while True:
            body, received = _receive(theirs)
            size = body.pop("memory_bytes")
            if received is not None:
                order, memory = None, _NOTHING  # they hold on to the memory that was
                memory = mapped(received, size)
                os.close(received)
            error: str | None = None
            hint: str | None = None
            try:
                order = Order.from_json(body, memory, order)
                carry_out(store, order)
            except Exception as failed:
                error, hint = str(failed), getattr(failed, "hint", None)
                if not isinstance(failed, CheckpointError):
                    error = f"Step {body['attempt']['step']} was not saved: {error or type(failed).__name__}"
            _send(theirs, {"error": error, "hint": hint, "warnings": told.take()}, None)


def _die_with(parent: int) -> None:
    """End this process at once when `parent` is dead."""
    watched: int | None = None
    with contextlib.suppress(OSError, AttributeError):  # not in every sandbox, and not before Linux 5.3
        watched = os.pidfd_open(parent)

    def watch() -> None:
        if watched is not None:
            poll = select.poll()
            poll.register(watched, select.POLLIN)
            poll.poll()
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(0)

    if os.getppid() != parent:  # it died before it could be watched, and the number may be another's
        os._exit(0)
    threading.Thread(target=watch, name="parent", daemon=True).start()


class _Warnings(logging.Handler):
    """What is logged here, to be told by the rank."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())

    def take(self) -> list[str]:
        texts, self._texts = self._texts, []
        return texts


def _send(to: socket.socket, body: Any, descriptor: int | None) -> None:
    data = json.dumps(body).encode()
    with_it = [] if descriptor is None else [descriptor]
    socket.send_fds(to, [_LENGTH.pack(len(data))], with_it)
    to.sendall(data)


def _receive(source: socket.socket) -> tuple[Any, int | None]:
    """The next message, and the descriptor that came with it; EOFError where the other side is gone."""
    first, descriptors, _, _ = socket.recv_fds(source, _LENGTH.size, 1)
    first += _exactly(source, _LENGTH.size - len(first))
    body = json.loads(_exactly(source, _LENGTH.unpack(first)[0]))
    return body, (descriptors[0] if descriptors else None)


def _exactly(source: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        count = source.recv_into(view[at:])
        if not count:
            raise EOFError
        at += count
    return bytes(data)
