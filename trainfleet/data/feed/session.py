"""One trainer's connection, as its feeder sees it: what it asks for is made, and sent as it is done."""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any, NamedTuple

from trainfleet.data.feed.stock import Stock
from trainfleet.data.feed.terms import Unit
from trainfleet.data.feed.workshop import Finished, Workshop
from trainfleet.data.samples import Made
from trainfleet.errors import DataError, PeerError, TrainfleetError
from trainfleet.net.channel import Channel, Message
from trainfleet.net.line import ALIVE_SECONDS, SILENCE_SECONDS

logger = logging.getLogger(__name__)

MOST_ASKED = 4096
"""Units that one trainer may have asked for at a time."""


class _Done(NamedTuple):
    task: int
    finished: Finished


_ALIVE = _Done(-1, Finished(Made(None), False))


class Session:
    """`run` returns when the trainer has gone, raises PeerError if it broke off or said what cannot be."""

    def __init__(self, channel: Channel, stock: Stock, workshop: Workshop) -> None:
        self.num_units = 0
        """Units sent."""
        self.num_bytes = 0
        self._channel, self._stock, self._workshop = channel, stock, workshop
        self._done: queue.SimpleQueue[_Done | None] = queue.SimpleQueue()
        self._asked: set[int] = set()
        self._lock = threading.Lock()

    def run(self, words: dict[str, Any]) -> None:
        """`words`: the offers, and what else a trainer is told first."""
        sender = threading.Thread(target=self._send_what_is_done, name="trainfleet-feed-send", daemon=True)
        try:
            self._channel.send("offer", words)
            sender.start()
            while self._heard(self._listen()):
                pass
        finally:
            self._workshop.forget(self)
            self._done.put(None)
            self._channel.close()
            if sender.ident is not None:
                sender.join()

    def close(self) -> None:
        """End the connection, from any thread; `run` ends with a PeerError."""
        self._channel.close()

    def _listen(self) -> Message:
        try:
            return self._channel.recv(SILENCE_SECONDS)
        except TimeoutError:
            raise PeerError(f"{self._channel.address} said nothing for {SILENCE_SECONDS:g} s.") from None

    def _heard(self, message: Message) -> bool:
        if message.kind == "ask":
            self._ask(message.head)
        elif message.kind == "forget":
            with self._lock:
                self._asked.clear()
            self._workshop.forget(self)
        elif message.kind == "bye":
            return False
        elif message.kind != "alive":
            raise PeerError(f"{self._channel.address} said {message.kind[:40]!r}, which trainers do not say.")
        return True

    def _ask(self, head: dict[str, Any]) -> None:
        task = head.pop("task", None)
        if type(task) is not int:
            raise PeerError(f"{self._channel.address} asked without the number of a task.")
        unit = Unit.from_plain(head)
        with self._lock:
            if task in self._asked or len(self._asked) >= MOST_ASKED:
                raise PeerError(
                    f"{self._channel.address} asked for task {task} twice, or for more than {MOST_ASKED} at a time."
                )
            self._asked.add(task)
        try:
            self._stock.check(unit)
        except DataError as exc:
            self._done.put(_Done(task, Finished(exc, False)))
            return
        self._workshop.submit(self, unit, lambda finished: self._done.put(_Done(task, finished)))

    def _send_what_is_done(self) -> None:
        """Until the connection is gone; its reader is told so by the channel itself."""
        while True:
            try:
                done = self._done.get(timeout=ALIVE_SECONDS)
            except queue.Empty:
                done = _ALIVE
            if done is None:
                return
            try:
                if done is _ALIVE:
                    self._channel.send("alive", {"progress": self._workshop.progress})
                else:
                    self._send(done)
            except PeerError as exc:
                logger.debug("%s", exc)
                return

    def _send(self, done: _Done) -> None:
        with self._lock:
            if done.task not in self._asked:
                return  # forgotten meanwhile
            self._asked.discard(done.task)
        made, idle = done.finished
        if not isinstance(made, Exception):
            head = {"task": done.task, "idle": idle, "skipped": [list(each) for each in made.skipped]}
            try:
                before = self._channel.counters.bytes_sent
                self._channel.send("made", head, made.batch)
                self.num_units += 1
                self.num_bytes += self._channel.counters.bytes_sent - before
                return
            except DataError as exc:
                made = exc
        self._channel.send("failed", {"task": done.task, **_told(made)})


def _told(exc: Exception) -> dict[str, Any]:
    error = exc if isinstance(exc, TrainfleetError) else DataError(f"A feeder failed: {type(exc).__name__}: {exc}")
    return {"error": str(error)[:4000], "hint": error.hint and error.hint[:1000]}
