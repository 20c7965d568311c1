"""One client's connection, as the service sees it: its batches are answered in turn, as far as there is room."""

from __future__ import annotations

import logging
import queue
import threading
from contextlib import suppress
from typing import Any, Final, NamedTuple

from trainfleet.batch import Batch, arrays
from trainfleet.errors import ConfigError, DataError, OutOfMemory, PeerError, TrainfleetError
from trainfleet.net.channel import Channel, Message
from trainfleet.net.line import ALIVE_SECONDS, SILENCE_SECONDS
from trainfleet.serve.offer import Offer
from trainfleet.serve.terms import Terms
from trainfleet.serve.turns import Finished, Turns

logger = logging.getLogger(__name__)

LEAST_BYTES: Final = 1 << 12
"""A batch counts as so many at least: what a place in a queue costs."""
FAILURES: Final[dict[str, type[TrainfleetError]]] = {cls.__name__: cls for cls in (DataError, ConfigError, OutOfMemory)}
"""What a service says of a batch that failed, and what its client raises."""


def weight_of(batch: Batch) -> int:
    """Bytes of the arrays of a batch or an answer."""
    return max(LEAST_BYTES, sum(int(array.nbytes) for array in arrays(batch)))


class _Done(NamedTuple):
    task: int
    finished: Finished
    num_bytes: int
    """Of the answer."""


_ALIVE = _Done(-1, Finished({}, False), 0)


class Session:
    """`run` returns when the client has gone, raises PeerError if it broke off or said what cannot be.

    No further batch is read while `offer.room` bytes of batches wait here for their turn or their answers to be
    sent, and none is computed while as many bytes of answers wait to be sent.
    """

    def __init__(self, channel: Channel, offer: Offer, turns: Turns) -> None:
        self.num_batches = 0
        """Answers sent, of failures too."""
        self.num_rows = 0
        self.num_bytes = 0
        """Both ways."""
        self._channel, self._offer, self._turns = channel, offer, turns
        self._done: queue.SimpleQueue[_Done | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._asked: dict[int, int] = {}  # by task, the bytes of a batch whose answer has not been sent
        self._held_bytes = 0  # their sum
        self._answer_bytes = 0  # that wait to be sent
        self._closing = False

    def run(self) -> None:
        sender = threading.Thread(target=self._send_what_is_done, name="trainfleet-serve-send", daemon=True)
        try:
            self._channel.send("offer", self._offer.to_plain())
            sender.start()
            while True:
                self._wait_for_room()
                if not self._heard(self._listen()):
                    return
        finally:
            self._turns.forget(self)
            self._done.put(None)
            self._channel.close()
            if sender.ident is not None:
                sender.join()

    def close(self) -> None:
        """End the connection, from any thread; `run` ends with a PeerError."""
        self._end()
        self._channel.close()

    @property
    def has_room(self) -> bool:
        return self._answer_bytes < self._offer.room

    @property
    def held_bytes(self) -> int:
        """Of batches that have no answer yet, or whose answers have not been sent."""
        return self._held_bytes

    def _wait_for_room(self) -> None:
        """An honest client never lets this wait: it knows `offer.room`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._held_bytes <= self._offer.room)

    def _listen(self) -> Message:
        before = self._channel.counters.bytes_received
        try:
            message = self._channel.recv(SILENCE_SECONDS)
        except TimeoutError:
            raise PeerError(f"{self._channel.address} said nothing for {SILENCE_SECONDS:g} s.") from None
        except DataError as exc:  # of which batch cannot be known
            self._refuse(exc)
            raise PeerError(f"{self._channel.address} sent what this service may not build: {exc}") from exc
        self.num_bytes += self._channel.counters.bytes_received - before
        return message

    def _refuse(self, exc: DataError) -> None:
        """Say it, and read until the client has hung up: an end with words unread would take ours away with it."""
        self._channel.send("refused", _told(exc))
        with suppress(PeerError, TimeoutError):
            while True:
                with suppress(DataError):
                    self._channel.recv(SILENCE_SECONDS)

    def _heard(self, message: Message) -> bool:
        if message.kind == "ask":
            self._ask(message)
        elif message.kind == "forget":
            self._turns.forget(self)
            with self._changed:
                self._asked.clear()
                self._held_bytes = 0
        elif message.kind == "bye":
            return False
        elif message.kind != "alive":
            raise PeerError(f"{self._channel.address} said {message.kind[:40]!r}, which clients do not say.")
        return True

    def _ask(self, message: Message) -> None:
        head = message.head
        if set(head) != {"task", "terms"} or type(head["task"]) is not int:
            raise PeerError(f"{self._channel.address} asked without the number of a task, or its terms.")
        task, terms, weight = head["task"], Terms.from_plain(head["terms"]), weight_of(message.body)
        with self._changed:
            if task in self._asked:
                raise PeerError(f"{self._channel.address} asked for task {task} twice.")
            self._asked[task] = weight
            self._held_bytes += weight
        self._turns.submit(self, message.body, terms, lambda finished: self._finished(task, finished))

    def _finished(self, task: int, finished: Finished) -> None:
        num_bytes = 0 if isinstance(finished.answer, Exception) else weight_of(finished.answer)
        with self._changed:
            self._answer_bytes += num_bytes
        self._done.put(_Done(task, finished, num_bytes))

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
                    self._channel.send("alive", {"progress": self._turns.progress})
                elif done.task in self._asked:  # and not forgotten meanwhile
                    self._send(done)
            except PeerError as exc:
                logger.debug("%s", exc)
                self._end()
                return
            self._let_go_of(done)

    def _send(self, done: _Done) -> None:
        answer, idle = done.finished
        before = self._channel.counters.bytes_sent
        if not isinstance(answer, TrainfleetError):
            try:
                self._channel.send("answer", {"task": done.task, "idle": idle}, answer)
                self.num_rows += int(answer["rows"]) if "rows" in answer else 0
            except DataError as exc:
                answer = exc
        if isinstance(answer, TrainfleetError):
            self._channel.send("failed", {"task": done.task, "idle": idle, **_told(answer)})
        self.num_batches += 1
        self.num_bytes += self._channel.counters.bytes_sent - before

    def _end(self) -> None:
        """No room will be made any more: the reader shall hear from the channel why."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _let_go_of(self, done: _Done) -> None:
        with self._changed:
            self._held_bytes -= self._asked.pop(done.task, 0)
            self._answer_bytes -= done.num_bytes
            self._changed.notify_all()
        self._turns.look()


def _told(exc: TrainfleetError) -> dict[str, Any]:
    kind = next((name for name, cls in FAILURES.items() if isinstance(exc, cls)), "DataError")
    return {"kind": kind, "error": str(exc)[:4000], "hint": exc.hint and exc.hint[:1000]}
