"""One GPU service, as a client sees it: batches go out as far as it has room for them, and answers come back."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from trainfleet.batch import Batch
from trainfleet.errors import DataError, PeerError
from trainfleet.net.channel import Channel, Message
from trainfleet.net.line import Line
from trainfleet.net.peers import Connect
from trainfleet.serve.offer import Offer
from trainfleet.serve.terms import Terms

_FORGET = -1
"""In place of a task: what was asked before is not wanted any more."""


class Question(NamedTuple):
    """All that an answer is a function of, beside the weights."""

    batch: Batch
    terms: Terms
    weight: int
    """Bytes of the batch."""


class Listening(Protocol):
    """Whoever has respondents. Called on their threads."""

    def joined(self, respondent: Respondent, offer: Offer) -> None:
        """Raises NotAdmitted for a service that has other weights."""

    def left(self, respondent: Respondent, reason: PeerError) -> None: ...

    def answered(self, respondent: Respondent, message: Message, num_bytes: int) -> None: ...

    def unsaid(self, respondent: Respondent, task: int, reason: DataError) -> None:
        """A batch cannot travel."""

    def alive(self, respondent: Respondent, progress: object) -> None:
        """`progress`: another number whenever a batch was computed there; whatever the service says."""

    def given_up(self, respondent: Respondent, reason: Exception) -> None:
        """It will not be tried again."""


class Respondent:
    """Starts at once and goes on until `close`, or until there is no sense in trying again.

    A thread of its own sends the batches, so that who hands them out never waits for a link.
    """

    def __init__(
        self,
        name: str,
        connect: Connect,
        listening: Listening,
        open_channel: Callable[[socket.socket], Channel],
        *,
        again: bool = True,
    ) -> None:
        self.name = name
        self._listening = listening
        self._changed = threading.Condition()
        self._outbox: deque[int] = deque()
        self._questions: dict[int, Question] = {}  # that are in the outbox or there
        self._there_bytes = 0  # of those that are there
        self._sent: set[int] = set()
        self._room = 0
        self._ends, self._again = False, again
        self._line = Line(name, connect, self, open_channel, again=again)
        self._sender = threading.Thread(target=self._send, name=f"trainfleet-ask-{name}", daemon=True)
        self._line.start()
        self._sender.start()

    def ask(self, task: int, question: Question) -> None:
        """Without an answer if the connection is gone: its thread hears that too. Never waits."""
        with self._changed:
            if task not in self._questions:
                self._questions[task] = question
                self._outbox.append(task)
                self._changed.notify_all()

    def forget(self) -> None:
        """Nothing that was asked is wanted any more."""
        self._let_go_of_all()
        with self._changed:
            self._outbox.append(_FORGET)
            self._changed.notify_all()

    def say_bye(self) -> None:
        """Have the service end the connection, once the batch that is on its way is there."""
        self._line.stop()
        self._end()

    def close(self) -> None:
        """End the connection, whether the service does or not."""
        self.say_bye()
        self._line.cut()

    def join(self, seconds: float) -> None:
        self._line.join(seconds)
        self._sender.join(seconds)

    @property
    def is_alive(self) -> bool:
        return self._line.is_alive

    # on the line's thread

    def joined(self, message: Message) -> None:
        if message.kind != "offer":
            raise PeerError(f"{self.name} began with {message.kind[:40]!r}, and GPU services begin with an offer.")
        offer = Offer.from_plain(message.head)
        self._let_go_of_all()
        self._room = offer.room
        self._listening.joined(self, offer)

    def heard(self, message: Message, num_bytes: int) -> None:
        if message.kind in ("answer", "failed"):
            task = message.head.get("task")
            with self._changed:
                if type(task) is not int:
                    raise PeerError(f"{self.name} answered without the number of a task.")
                self._let_go_of(task)
            self._listening.answered(self, message, num_bytes)
        elif message.kind == "alive":
            self._listening.alive(self, message.head.get("progress"))
        elif message.kind == "refused":
            raise DataError(f"{self.name} may not build our batches: {str(message.head.get('error'))[:1000]}")
        else:
            raise PeerError(f"{self.name} said {message.kind[:40]!r}, which GPU services do not say.")

    def left(self, reason: PeerError) -> None:
        self._let_go_of_all()
        self._listening.left(self, reason)
        if not self._again:
            self._end()

    def given_up(self, reason: Exception) -> None:
        self._let_go_of_all()
        self._listening.given_up(self, reason)
        self._end()

    # between them

    def _send(self) -> None:
        """On its own thread, until the end: the next batch that there is room for. No word waits for it elsewhere."""
        while (task := self._next()) is not None:
            if task == _FORGET:
                self._line.say("forget")
                continue
            question = self._questions.get(task)
            if question is None:
                continue  # the connection ended in this moment
            try:
                self._line.say("ask", {"task": task, "terms": question.terms.to_plain()}, question.batch)
            except DataError as exc:
                with self._changed:
                    self._let_go_of(task)
                self._listening.unsaid(self, task, exc)
            del question
        self._line.say("bye")

    def _next(self) -> int | None:
        with self._changed:
            self._changed.wait_for(lambda: self._ends or self._may_send())
            if self._ends:
                return None
            task = self._outbox.popleft()
            if task != _FORGET:
                self._sent.add(task)
                self._there_bytes += self._questions[task].weight
            return task

    def _may_send(self) -> bool:
        if not self._outbox:
            return False
        if self._outbox[0] == _FORGET:
            return True
        return not self._sent or self._there_bytes + self._questions[self._outbox[0]].weight <= self._room

    def _let_go_of(self, task: int) -> None:
        question = self._questions.pop(task, None)
        if question is not None and task in self._sent:
            self._sent.discard(task)
            self._there_bytes -= question.weight
            self._changed.notify_all()

    def _let_go_of_all(self) -> None:
        with self._changed:
            self._outbox.clear()
            self._questions.clear()
            self._sent.clear()
            self._there_bytes = 0

    def _end(self) -> None:
        with self._changed:
            self._ends = True
            self._changed.notify_all()
