"""Units made for many trainers by one crew of workers, in turn, so that none waits for another's whole queue."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from multiprocessing import Pipe, util
from typing import NamedTuple, TypeAlias

from trainfleet.data.crew import Workers
from trainfleet.data.feed.terms import Unit
from trainfleet.data.samples import Made
from trainfleet.data.workers import WorkerPool
from trainfleet.errors import DataError

logger = logging.getLogger(__name__)

Answer: TypeAlias = Callable[["Finished"], None]


class Finished(NamedTuple):
    """What came of a unit."""

    made: Made | Exception
    idle: bool
    """Nothing else is asked of us by the same trainer: it could ask for more at a time."""


@dataclass
class _Order:
    owner: Hashable
    unit: Unit
    answer: Answer


class Workshop:
    """One thread has the pool; `submit` and `forget` may be called by any. The crew has one worker at least."""

    def __init__(self, crew: Workers) -> None:
        self._crew = crew
        self._waiting: dict[Hashable, deque[_Order]] = {}  # by owner, in the order of their turns
        self._begun: dict[int, _Order] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._closing = False
        self._wake, self._waker = Pipe(duplex=False)
        self._woken = False
        # Before there are threads and connections, so that the workers inherit none.
        self._pool: WorkerPool | None = crew.open()
        self._thread = threading.Thread(target=self._run, name="trainfleet-workshop", daemon=True)
        self._thread.start()
        # A program that ends without closing: before multiprocessing ends the workers, who would be replaced.
        self._at_exit = util.Finalize(None, self.close, exitpriority=200)

    def submit(self, owner: Hashable, unit: Unit, answer: Answer) -> None:
        """Have `unit` made for `owner`; `answer` is called on a thread of ours and must not wait."""
        with self._lock:
            self._waiting.setdefault(owner, deque()).append(_Order(owner, unit, answer))
            self._wake_up()

    def forget(self, owner: Hashable) -> None:
        """Make no more of what `owner` asked for; what is being made is thrown away."""
        with self._lock:
            self._waiting.pop(owner, None)
            for number in [number for number, order in self._begun.items() if order.owner == owner]:
                self._begun[number].answer = _nobody

    @property
    def waiting(self) -> int:
        """Units that no worker has begun."""
        with self._lock:
            return sum(len(queue) for queue in self._waiting.values())

    @property
    def progress(self) -> int:
        """Another number whenever a worker has come to another sample."""
        pool = self._pool
        return pool.progress if pool is not None else 0

    @property
    def pids(self) -> list[int]:
        pool = self._pool
        return pool.pids if pool is not None else []

    def close(self) -> None:
        """End the workers; what is asked for stays without an answer. May be called twice."""
        self._at_exit.cancel()
        with self._lock:
            if not self._closing:
                self._closing = True
                self._wake_up()
        self._thread.join(30)
        if self._pool is not None:
            self._pool.close()

    def _run(self) -> None:
        while not self._closing:
            try:
                self._work()
            except Exception as exc:  # the workers fail as a whole
                self._fail_all(exc)

    def _work(self) -> None:
        if self._pool is None:
            self._pool = self._crew.open()
            assert self._pool is not None
        for order in self._take_turn(most=self._crew.depth - len(self._begun)):
            number = next(self._numbers)
            with self._lock:
                self._begun[number] = order
            self._pool.submit(number, order.unit)
        for number, made in self._pool.receive_any(0.5, self._wake):
            with self._lock:
                order = self._begun.pop(number)
            self._finish(order, made)
        self._go_to_sleep()

    def _wake_up(self) -> None:
        if not self._woken:  # one byte at most, so that this never waits
            self._woken = True
            self._waker.send_bytes(b"1")

    def _go_to_sleep(self) -> None:
        with self._lock:
            if self._woken:
                self._wake.recv_bytes()
                self._woken = False

    def _take_turn(self, most: int) -> list[_Order]:
        """The next orders: one of each owner after the other."""
        taken: list[_Order] = []
        with self._lock:
            while self._waiting and len(taken) < most:
                owner, queue = next(iter(self._waiting.items()))
                taken.append(queue.popleft())
                del self._waiting[owner]
                if queue:
                    self._waiting[owner] = queue  # behind the others
        return taken

    def _finish(self, order: _Order, made: Made | Exception) -> None:
        with self._lock:
            busy = order.owner in self._waiting or any(other.owner == order.owner for other in self._begun.values())
        order.answer(Finished(made, not busy))

    def _fail_all(self, exc: Exception) -> None:
        logger.error("The workers failed and are started anew: %s", exc)
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
        error = exc if isinstance(exc, DataError) else DataError(f"The workers failed: {type(exc).__name__}: {exc}")
        with self._lock:
            orders, self._begun = list(self._begun.values()), {}
        for order in orders:
            order.answer(Finished(error, False))


def _nobody(finished: Finished) -> None:
    """An owner that has gone."""
