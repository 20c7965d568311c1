"""All GPU services of one client as a pool: whoever is free answers next, and no question is lost with a service."""

from __future__ import annotations

import logging
from datetime import timedelta

from trainfleet.errors import DataError, NotAdmitted, PeerError, TrainfleetError
from trainfleet.net.channel import Message
from trainfleet.net.peers import Connect, Ways
from trainfleet.net.pool import Pool
from trainfleet.serve.offer import Offer
from trainfleet.serve.respondent import Question, Respondent
from trainfleet.serve.session import FAILURES, weight_of
from trainfleet.serve.terms import Answer

logger = logging.getLogger(__name__)

_FIRST_ROOM = 4
"""Batches that a service is given ahead at first; more where it comes to have nothing to do."""
_LEAST_AHEAD = 2


class Respondents(Pool[Question, Answer | TrainfleetError]):
    """`submit`, `receive` and `forget` are for one thread."""

    def __init__(self, ways: Ways, *, timeout: timedelta, window_bytes: int) -> None:
        self._window_bytes, self._channel = window_bytes, ways.channel
        super().__init__(
            ways,
            self._respondent,
            role="client",
            admits="gpu-service",
            called="GPU service",
            timeout=timeout,
            remedy="Start one with `trainfleet gpu-service`, or look at its address with `trainfleet doctor`.",
        )
        self._waiting_bytes: dict[int, int] = {}  # by task: of the batch, then of its answer
        self._offer: Offer | None = None
        self._peers.open()

    def offer(self) -> Offer:
        """That of the first service; PeerError if none is there in time."""
        self._peers.wait(lambda: self._offer is not None, "the first GPU service")
        assert self._offer is not None
        return self._offer

    @property
    def held_bytes(self) -> int:
        """Of batches without an answer, and of answers that nobody has taken yet."""
        with self._changed:
            return sum(self._waiting_bytes.values())

    @property
    def wants_more(self) -> bool:
        """Whether another batch may be submitted: no more are held than fit, nor than the services have use for."""
        with self._changed:
            ahead = len(self._waiting_bytes)
            if ahead < _LEAST_AHEAD:
                return True
            return ahead < 2 * self._leases.room and sum(self._waiting_bytes.values()) < self._window_bytes

    def submit(self, task: int, question: Question) -> None:
        with self._changed:
            self._waiting_bytes[task] = question.weight
        super().submit(task, question)

    def receive(self, task: int) -> Answer | TrainfleetError:
        """The answer to a submitted task, or what its batch met. Raises PeerError as `take` does."""
        found = self.take(task, "an answer")
        with self._changed:
            self._waiting_bytes.pop(task)
        return found

    def forget(self) -> None:
        """Drop all that was submitted."""
        with self._changed:
            tasks = list(self._waiting_bytes)
            self._waiting_bytes.clear()
        self.drop(tasks)

    def close(self) -> None:
        super().close()
        with self._changed:
            self._waiting_bytes.clear()

    # on the respondents' threads

    def joined(self, respondent: Respondent, offer: Offer) -> None:
        with self._changed:
            self._offer = self._offer or offer
            if offer.digest != self._offer.digest:
                raise NotAdmitted(
                    f"GPU service {respondent.name} has other weights of {offer.model} ({offer.digest[:12]}) than "
                    f"those before it ({self._offer.digest[:12]}), so its answers would be others.",
                    hint="Start all services with the same checkpoint: --weights.",
                )
            self._leases.join(respondent, room=_FIRST_ROOM)
        self._peers.joined(respondent.name)
        logger.info("GPU service %s is here: %s on %s.", respondent.name, offer.model, offer.device)
        self._hand_out()

    def answered(self, respondent: Respondent, message: Message, num_bytes: int) -> None:
        answer = _parsed(message)
        self.take_in(respondent, message.head["task"], answer, num_bytes, idle=message.head.get("idle") is True)

    def unsaid(self, respondent: Respondent, task: int, reason: DataError) -> None:
        self.take_in(respondent, task, reason, 0, idle=False)

    # between them

    def _keep(self, task: int, found: Answer | TrainfleetError) -> None:
        super()._keep(task, found)
        self._waiting_bytes[task] = 0 if isinstance(found, TrainfleetError) else weight_of(found)

    def _respondent(self, name: str, connect: Connect, again: bool) -> Respondent:
        return Respondent(name, connect, self, self._channel, again=again)


def _parsed(message: Message) -> Answer | TrainfleetError:
    head = message.head
    if message.kind == "failed":
        error, hint = head.get("error"), head.get("hint")
        cls = FAILURES.get(str(head.get("kind")), DataError)
        return cls(str(error)[:4000], hint=hint[:1000] if isinstance(hint, str) else None)
    if not isinstance(message.body, dict):
        raise PeerError(f"A GPU service answered with a {type(message.body).__name__}, not arrays by name.")
    return message.body
