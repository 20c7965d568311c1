"""Worker processes that make batches ahead of the loop, and what happens when one of them dies.

torch's DataLoader is not used here, for it cannot say which sample a dead worker was on, nor restart it,
nor resume from what was *consumed*, nor run without torch. Tasks are spans of positions and batches are
pure functions of them, so any worker can do or redo any task, and the results are put in order here.

On Linux workers are forked: any dataset works, also one defined in a notebook, and they start in
milliseconds. What makes fork safe enough: the child keeps to one thread, never touches CUDA, ignores
SIGINT and SIGTERM (the parent decides), and lets go of every socket of the parent, so that no port and
no peer connection outlives the rank; a child that hangs nevertheless falls under the deadline of a silent
worker and is replaced. Where a library must not be forked, `start_method="forkserver"` pickles instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import stat
import struct
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, Literal, TypeAlias

from trainfleet.data.sampler import Span
from trainfleet.data.samples import Bad, Made, Maker
from trainfleet.data.shared import Receiver, Sender, anonymous_file
from trainfleet.errors import DataError, TrainfleetError
from trainfleet.imports import imported

logger = logging.getLogger(__name__)

StartMethod: TypeAlias = Literal["fork", "forkserver", "spawn"]
CELL = struct.Struct("<qqq")  # what a worker is on: a counter of its steps, the task, the sample; -1 for none
FORGIVE_AFTER = 1000  # batches after which a death no longer counts against the budget
START_SECONDS = 60.0  # to unpickle the source and import what it needs
PR_SET_PDEATHSIG = 1


@dataclass
class _Worker:
    """One process, seen from the parent."""

    number: int
    process: BaseProcess
    conn: Connection
    receiver: Receiver
    cell: mmap.mmap | None = None
    tasks: dict[int, Span] = field(default_factory=dict)  # sent, not yet answered, in order
    seen: int = -1  # the counter of its steps when it last had moved
    since: float = 0.0

    def is_on(self) -> tuple[int, int, int]:
        if self.cell is None:
            return 0, -1, -1
        counter, task, index = CELL.unpack_from(self.cell)
        return int(counter), int(task), int(index)


class WorkerPool:
    """`submit(task, span)` for several, then `receive(task)` for each in any order; `close()` leaves no process."""

    def __init__(
        self,
        maker: Maker,
        *,
        workers: int,
        bad: Bad = "raise",
        timeout: timedelta = timedelta(minutes=2),
        restarts: int = 3,
        start_method: StartMethod | None = None,
    ) -> None:
        self._maker, self._bad, self._restarts = maker, bad, restarts
        self._timeout = timeout.total_seconds()
        self._context = multiprocessing.get_context(
            start_method or ("fork" if sys.platform.startswith("linux") else "spawn")
        )
        self._done: dict[int, Callable[[], Any] | Exception] = {}
        self._wanted: set[int] = set()
        self._delivered = 0
        self._deaths: deque[int] = deque()  # batches delivered when each death happened
        self._killed_on: Counter[int] = Counter()
        self._poison: set[int] = set()
        self._workers: list[_Worker] = []
        # Before multiprocessing's own exit handler, which would wait for workers that ignore SIGTERM.
        self._finalizer = util.Finalize(self, _end_all, args=(self._workers,), exitpriority=100)
        try:
            for number in range(workers):
                self._workers.append(self._start(number))
            for worker in self._workers:
                self._greet(worker)
        except BaseException:
            self.close()
            raise

    def submit(self, task: int, span: Span) -> None:
        """Have `span` made by the worker with the least to do."""
        self._wanted.add(task)
        worker = min(self._workers, key=lambda w: len(w.tasks))
        self._send(worker, task, span)

    def receive(self, task: int) -> Made:
        """The batch of a submitted task; raises what making it raised, DataError when the workers fail."""
        assert task in self._wanted, f"task {task} was never submitted"
        while task not in self._done:
            self._collect(timeout=min(0.5, self._timeout))
        return self._take(task)

    def receive_any(self, timeout: float, wake: Connection) -> list[tuple[int, Made | Exception]]:
        """Tasks that are done, with their batch or error; none after `timeout` seconds or at a word from `wake`."""
        if not self._done:
            self._collect(timeout, wake)
        found: list[tuple[int, Made | Exception]] = []
        for task in list(self._done):
            try:
                found.append((task, self._take(task)))
            except Exception as exc:
                found.append((task, exc))
        return found

    def _take(self, task: int) -> Made:
        found = self._done.pop(task)
        self._wanted.discard(task)
        if isinstance(found, Exception):
            raise found
        self._delivered += 1
        made: Made = found()
        return made

    def forget(self) -> None:
        """Drop every submitted task: what comes of them is thrown away."""
        self._wanted.clear()
        self._done.clear()

    def close(self) -> None:
        """End the workers; may be called twice."""
        self._done.clear()
        self._finalizer()

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid or 0 for worker in self._workers]

    @property
    def progress(self) -> int:
        """Another number whenever a worker has come to another sample."""
        return sum(worker.is_on()[0] for worker in self._workers)

    def _start(self, number: int) -> _Worker:
        ours, theirs = self._context.Pipe(duplex=True)
        in_main_thread = threading.current_thread() is threading.main_thread()
        arguments = (self._maker, theirs, os.getpid(), in_main_thread, self._context.get_start_method())
        process = self._context.Process(  # type: ignore[attr-defined]
            target=_work, args=arguments, name=f"trainfleet-data-{number}", daemon=True
        )
        try:
            process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as exc:
            ours.close()
            raise DataError(
                f"The source, transform or collate cannot be sent to worker processes: {exc}. "
                "Define it at the top level of a module, or use start_method='fork' or workers=0."
            ) from exc
        finally:
            theirs.close()
        return _Worker(number, process, ours, Receiver(ours))

    def _greet(self, worker: _Worker) -> None:
        """Wait until a started worker has unpickled what it needs, and has said where it tells its progress."""
        if not worker.conn.poll(START_SECONDS):
            raise DataError(f"Data worker {worker.number} did not start within {START_SECONDS:g} s.")
        try:
            descriptor = recv_handle(worker.conn)
        except (EOFError, OSError, RuntimeError) as exc:
            worker.process.join(5)
            raise DataError(
                f"Data worker {worker.number} {_end_of(worker.process)} while it started; the lines above may say why. "
                "Its source, transform and collate must be importable in a new process."
            ) from exc
        worker.cell = mmap.mmap(descriptor, 0)
        os.close(descriptor)
        _set_read_timeout(worker.conn, self._timeout)

    def _send(self, worker: _Worker, task: int, span: Span) -> None:
        if not worker.tasks:
            worker.since = time.monotonic()
        worker.tasks[task] = span
        try:
            worker.conn.send((task, span, frozenset(self._poison), worker.receiver.take_free()))
        except OSError:
            self._replace(worker, _end_of(worker.process))

    def _collect(self, timeout: float, *others: Connection) -> None:
        """Take in what has arrived; wait for the first of it. Replace who has said nothing for too long."""
        ready = wait([*(w.conn for w in self._workers), *others], timeout)
        for worker in [w for w in self._workers if w.conn in ready]:
            try:
                (task, is_error), body = worker.receiver.recv()
            except BlockingIOError:
                self._replace(worker, f"stopped in the middle of a message for {self._timeout:g} s")
                continue
            except (EOFError, OSError, RuntimeError):
                worker.process.join(5)
                self._replace(worker, _end_of(worker.process))
                continue
            worker.tasks.pop(task, None)
            if task in self._wanted:
                self._done[task] = _retold(*body()) if is_error else body
        self._replace_silent()

    def _replace_silent(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            counter = worker.is_on()[0]
            if counter != worker.seen or not worker.tasks or worker.conn.poll():
                worker.seen, worker.since = counter, now
            elif now - worker.since > self._timeout:
                self._replace(worker, f"said nothing for {self._timeout:g} s")

    def _replace(self, worker: _Worker, what_happened: str) -> None:
        """Report a lost worker, start another in its place and give it the same tasks."""
        _, task, index = worker.is_on()
        _end_all([worker])
        was_on = f"on sample {index}" if index >= 0 else "between two batches"
        if (span := worker.tasks.get(task)) is not None:
            was_on += f", in the batch of positions {span.begin} to {span.end - 1} of epoch {span.epoch}"
        report = f"Data worker {worker.number} (process {worker.process.pid}) {what_happened} while {was_on}."
        if index >= 0:
            self._killed_on[index] += 1
            if self._killed_on[index] > 1:
                if self._bad == "raise":
                    raise DataError(
                        f"{report} It is the second worker that sample {index} ended.",
                        hint=f"Look at sample {index}; bad='skip' leaves such samples out and counts them.",
                    )
                self._poison.add(index)
        while self._deaths and self._delivered - self._deaths[0] > FORGIVE_AFTER:
            self._deaths.popleft()
        self._deaths.append(self._delivered)
        if len(self._deaths) > self._restarts:
            raise DataError(
                f"{report} That is {len(self._deaths)} lost workers within {FORGIVE_AFTER} batches, "
                f"more than restarts={self._restarts}.",
                hint="Is there memory for so many workers? Try fewer, or workers=0 to see the error itself.",
            )
        logger.warning("%s A new one takes over (%d of %d).", report, len(self._deaths), self._restarts)
        fresh = self._start(worker.number)
        self._workers[self._workers.index(worker)] = fresh
        self._greet(fresh)
        for number, span in worker.tasks.items():
            if number in self._wanted:
                self._send(fresh, number, span)


def _set_read_timeout(conn: Connection, seconds: float) -> None:
    """A worker that stops in the middle of a message raises BlockingIOError here instead of a wait for ever."""
    with socket.fromfd(conn.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as pipe:
        whole = int(seconds)
        timeout = struct.pack("@ll", whole, max(1, int((seconds - whole) * 1e6)))
        pipe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)


def _end_of(process: BaseProcess) -> str:
    code = process.exitcode
    if code is None:
        return "closed its pipe"
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}" + (" (by the kernel if memory ran out)" if name == "SIGKILL" else "")


def _end_all(workers: list[_Worker]) -> None:
    """Kill and collect: a worker has nothing to save. At most a few milliseconds each."""
    for worker in workers:
        worker.conn.close()
        if worker.process.is_alive():
            worker.process.kill()
    for worker in workers:
        worker.process.join(10)


# -- in the worker process ---------------------------------------------------------------------------------------


def _work(maker: Maker, conn: Connection, parent: int, in_main_thread: bool, method: StartMethod) -> None:
    _settle(conn, parent, in_main_thread, method)
    descriptor = anonymous_file(CELL.size)
    cell = mmap.mmap(descriptor, 0)
    CELL.pack_into(cell, 0, 0, -1, -1)
    send_handle(conn, descriptor, parent)
    os.close(descriptor)
    sender = Sender(conn)
    counter = 0
    while True:
        try:
            task, span, poison, freed = conn.recv()
        except (EOFError, OSError):
            return
        sender.free_(freed)

        def progress(index: int, task: int = task) -> None:
            nonlocal counter
            counter += 1
            CELL.pack_into(cell, 0, counter, task, index)

        is_error = False
        body: Any = None
        try:
            _one_thread()
            body = maker.make(span, progress=progress, poison=poison)
        except Exception as exc:
            is_error, body = True, _told(exc)
        progress(-1)
        try:
            _reply(sender, task, is_error, body)
        except OSError:
            return  # the parent is gone, or done with us
        del body


def _reply(sender: Sender, task: int, is_error: bool, body: Any) -> None:
    try:
        sender.send((task, is_error), body)
    except (pickle.PicklingError, AttributeError, TypeError) as exc:
        error = DataError(f"A batch cannot be sent from its worker process: {exc}. Use arrays, numbers and strings.")
        sender.send((task, True), _told(error))


def _told(exc: Exception) -> tuple[type[TrainfleetError], str, str | None, str]:
    """What `_retold` needs to raise the same error in the parent."""
    error = exc if isinstance(exc, TrainfleetError) else DataError(f"A data worker failed: {type(exc).__name__}: {exc}")
    return type(error), str(error), error.hint, "".join(traceback.format_exception(exc))


def _retold(kind: type[TrainfleetError], message: str, hint: str | None, trace: str) -> TrainfleetError:
    error = kind(message, hint=hint)
    error.__cause__ = RuntimeError(f"in a data worker:\n{trace}")
    return error


def _settle(conn: Connection, parent: int, in_main_thread: bool, method: StartMethod) -> None:
    """Live and die for the parent only."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if method == "fork":
        signal.set_wakeup_fd(-1)
        _release_sockets(keep=conn.fileno())
    # The kernel's notice is bound to the *thread* that started us, so it only serves for the main thread,
    # and to the process that forked us, which may be a fork server, who outlives the true parent.
    if sys.platform.startswith("linux") and in_main_thread and method != "forkserver":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)
    else:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(forked_by: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == forked_by and not wait([parent.sentinel], 0.5):
        pass
    os._exit(0)


def _release_sockets(keep: int) -> None:
    """Let go of the parent's connections. The numbers stay taken, by /dev/null, so that an object which
    closes its descriptor later closes nothing of ours."""
    null = os.open(os.devnull, os.O_RDWR)
    with contextlib.suppress(FileNotFoundError):
        for descriptor in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
            with contextlib.suppress(OSError):
                if descriptor > 2 and descriptor != keep and stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                    os.dup2(null, descriptor, inheritable=False)
    os.close(null)


def _one_thread() -> None:
    """Torch's pool of threads does not survive a fork, and workers share the cores anyway."""
    torch = imported("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
