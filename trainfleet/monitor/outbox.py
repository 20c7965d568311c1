"""What leaves the process: a bounded queue, and one thread that delivers in its own time, so that no loop waits."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

MOST_WAITING = 10_000
"""Items; a step makes a few, and a service that is hours behind does not get the newest either."""
MOST_TOGETHER = 500
"""Items of one delivery."""


class Outbox(Generic[Item]):
    """Takes items without ever waiting; what finds no room, or cannot be delivered, is lost and counted.

    `name` begins the warnings: one when the first item is lost, and one at the end with their number. `deliver`
    is called in a daemon thread with those that wait, in order; what it raises loses them, and the next are tried anew.
    """

    def __init__(
        self,
        name: str,
        deliver: Callable[[Sequence[Item]], None],
        *,
        most_waiting: int = MOST_WAITING,
        most_together: int = MOST_TOGETHER,
    ) -> None:
        self.name = name
        self.lost = 0
        self._deliver = deliver
        self._most_waiting, self._most_together = most_waiting, most_together
        self._process = os.getpid()
        self._items: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._under_way = 0
        self._has_warned = False
        self._thread: threading.Thread | None = None

    def put(self, item: Item) -> None:
        """Deliver this when its turn comes. A forked process has no such thread, and delivers nothing."""
        if self._process != os.getpid():
            return
        if self._items.qsize() >= self._most_waiting:
            self._lose(1, f"{self._most_waiting} wait already")
            return
        self._items.put(item)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name=f"outbox of {self.name}")
            self._thread.start()

    def close(self, seconds: float) -> bool:
        """Wait so long for what is still to be delivered; False where that was not enough, and the rest is lost."""
        thread, self._thread = self._thread, None
        if thread is not None and self._process == os.getpid():
            self._items.put(None)
            thread.join(seconds)
            if thread.is_alive():
                self.lost += self._under_way + self._items.qsize() - 1
        if self.lost:
            logger.warning("%s: %d were lost in all.", self.name, self.lost)
            self.lost = 0
        return thread is None or not thread.is_alive()

    def _work(self) -> None:
        is_last = False
        while not is_last:
            items: list[Item] = []
            for item in self._next():
                if item is None:
                    is_last = True
                else:
                    items.append(item)
            self._under_way = len(items)
            if items:
                try:
                    self._deliver(items)
                except Exception as exc:
                    self._lose(len(items), f"{type(exc).__name__}: {exc}")
            self._under_way = 0

    def _next(self) -> Iterable[Item | None]:
        yield self._items.get()
        for _ in range(self._most_together - 1):
            try:
                yield self._items.get_nowait()
            except queue.Empty:
                return

    def _lose(self, count: int, why: str) -> None:
        self.lost += count
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: %d could not be delivered (%s). The run goes on; what is lost is counted.",
                self.name,
                count,
                why.splitlines()[0][:500] if why else "no reason given",
            )
