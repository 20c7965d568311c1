"""One trainer's connection, as its feeder sees it: what it asks for is made, and sent as it is done."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Any, NamedTuple

from trainfleet.data.feed.stock import Stock
from trainfleet.data.feed.terms import Unit
from trainfleet.data.feed.times import Times
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
    unit: Unit | None = None
    asked: float = 0.0
    at: float = 0.0


_ALIVE = _Done(-1, Finished(Made(None), False))


class Session:
    """`run` returns when the trainer has gone, raises PeerError if it broke off or said what cannot be."""

    def __init__(self, channel: Channel, stock: Stock, workshop: Workshop, times: Times | None = None) -> None:
        self.num_units = 0
        """Units sent."""
        self.num_bytes = 0
        self.reached: tuple[int, int] | None = None
        """Epoch and position of the training stream up to which units were sent."""
        self._channel, self._stock, self._workshop, self._times = channel, stock, workshop, times or Times()
        self._done: queue.SimpleQueue[_Done | None] = queue.SimpleQueue()
        self._asked: set[int] = set()
        self._begun: dict[int, float] = {}  # when the sending of a task began that the trainer has not told of yet
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
        self._note_arrivals(head.pop("arrived", []))
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
        now = time.monotonic()
        self._workshop.submit(
            self, unit, lambda finished: self._done.put(_Done(task, finished, unit, now, time.monotonic()))
        )

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

    def _note_arrivals(self, arrived: Any) -> None:
        """How long batches were under way, which their trainer tells with its next question."""
        if not isinstance(arrived, list) or not all(_is_arrival(each) for each in arrived):
            raise PeerError(f"{self._channel.address} told of arrivals in words that are none.")
        for task, seconds in arrived:
            if (begun := self._begun.pop(task, None)) is not None:
                self._times.arrived(begun, seconds)

    def _note_place(self, unit: Unit | None) -> None:
        if unit is not None and unit.terms.stream == "training":
            self.reached = max(self.reached or (0, 0), (unit.epoch, unit.end))

    def _send(self, done: _Done) -> None:
        with self._lock:
            if done.task not in self._asked:
                return  # forgotten meanwhile
            self._asked.discard(done.task)
        made, idle = done.finished
        if not isinstance(made, Exception):
            self._times.made(*made.spent)
            head = {
                "task": done.task,
                "idle": idle,
                "skipped": [list(each) for each in made.skipped],
                "seconds": _seconds(done, made),
            }
            try:
                before = self._channel.counters.bytes_sent
                if len(self._begun) >= MOST_ASKED:  # a trainer need not tell
                    del self._begun[next(iter(self._begun))]
                self._begun[done.task] = time.monotonic()
                with self._times.sending():
                    self._channel.send("made", head, made.batch)
                self._note_place(done.unit)
                self.num_units += 1
                self.num_bytes += self._channel.counters.bytes_sent - before
                return
            except DataError as exc:
                made = exc
        self._channel.send("failed", {"task": done.task, **_told(made)})


def _is_arrival(each: Any) -> bool:
    return isinstance(each, list) and len(each) == 2 and type(each[0]) is int and _is_time(each[1])


def _is_time(each: Any) -> bool:
    return type(each) is float and 0 <= each < 1e9


def _seconds(done: _Done, made: Made) -> list[float]:
    """In the source, in the transform, waiting for a worker, waiting to be sent: rounded to microseconds."""
    queued = max(0.0, done.at - done.asked - sum(made.spent))
    return [round(each, 6) for each in (*made.spent, queued, time.monotonic() - done.at)]


def _told(exc: Exception) -> dict[str, Any]:
    error = exc if isinstance(exc, TrainfleetError) else DataError(f"A feeder failed: {type(exc).__name__}: {exc}")
    return {"error": str(error)[:4000], "hint": error.hint and error.hint[:1000]}
