"""All GPU services of one client as a pool: whoever is free answers next, and no question is lost with a service."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Hashable, Sequence
from datetime import timedelta
from typing import Any

from trainfleet.errors import DataError, NotAdmitted, PeerError, TrainfleetError
from trainfleet.net.address import Address
from trainfleet.net.channel import Message
from trainfleet.net.lease import Leases
from trainfleet.net.peers import Connect, Member, Peers, Ways
from trainfleet.serve.offer import Offer
from trainfleet.serve.respondent import Question, Respondent
from trainfleet.serve.session import FAILURES, weight_of
from trainfleet.serve.terms import Answer

logger = logging.getLogger(__name__)

_FIRST_ROOM = 4
"""Batches that a service is given ahead at first; more where it comes to have nothing to do."""
_LEAST_AHEAD = 2


class Respondents:
    """`submit`, `receive` and `forget` are for one thread."""

    def __init__(self, ways: Ways, *, timeout: timedelta, window_bytes: int) -> None:
        self.repeated = 0
        """Batches that were asked for anew, of another service or the same."""
        self.seconds_waited = 0.0
        """The caller's, for answers that were not here yet."""
        self._window_bytes = window_bytes
        self._peers = Peers(
            ways,
            self._member,
            role="client",
            admits="gpu-service",
            timeout=timeout,
            remedy="Start one with `trainfleet gpu-service`, or look at its address with `trainfleet doctor`.",
        )
        self._ways, self._changed = ways, self._peers.changed
        self._leases: Leases[Question] = Leases()
        self._waiting_bytes: dict[int, int] = {}  # by task: of the batch, then of its answer
        self._done: dict[int, Answer | TrainfleetError] = {}
        self._offer: Offer | None = None
        self._peers.open()

    def offer(self) -> Offer:
        """That of the first service; PeerError if none is there in time."""
        self._peers.wait(lambda: self._offer is not None, "the first GPU service")
        assert self._offer is not None
        return self._offer

    @property
    def address(self) -> Address | None:
        """Where services may connect to, with the port that was chosen; None if they are called."""
        return self._peers.address

    @property
    def connected(self) -> int:
        """Services that are here."""
        return self._leases.peers

    @property
    def lost(self) -> int:
        """Connections to services that ended by themselves."""
        return self._peers.lost

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
            self._leases.add(task, question)
            self._waiting_bytes[task] = question.weight
        self._hand_out()

    def has(self, task: int) -> bool:
        """Whether the answer is here."""
        return task in self._done

    def receive(self, task: int) -> Answer | TrainfleetError:
        """The answer to a submitted task, or what its batch met. Raises PeerError when no service was there, or none
        came any further, for the whole timeout."""
        begun = time.monotonic()
        try:
            self._peers.wait(lambda: task in self._done, "an answer", lambda: self._hasten(task))
        finally:
            self.seconds_waited += time.monotonic() - begun
        with self._changed:
            found = self._done.pop(task)
            self._waiting_bytes.pop(task)
        return found

    def forget(self) -> None:
        with self._changed:
            self._leases.clear()
            self._done.clear()
            self._waiting_bytes.clear()
        for member in self._peers.members:
            assert isinstance(member, Respondent)
            member.forget()

    def close(self) -> None:
        self._peers.close()
        with self._changed:
            self._leases.clear()
            self._done.clear()
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

    def left(self, respondent: Respondent, reason: PeerError) -> None:
        with self._changed:
            here = self._leases.peers
            back = self._leases.leave(respondent)
            was_here = self._leases.peers < here
            self.repeated += back
        self._peers.left(respondent.name, reason)
        if was_here:  # else the reason is said when somebody has waited for a while
            logger.warning("GPU service %s is gone: %s %d batches are asked again.", respondent.name, reason, back)
        self._hand_out()

    def answered(self, respondent: Respondent, message: Message, num_bytes: int) -> None:
        answer = _parsed(message)
        self._take(respondent, message.head["task"], answer, num_bytes, idle=message.head.get("idle") is True)

    def unsaid(self, respondent: Respondent, task: int, reason: DataError) -> None:
        self._take(respondent, task, reason, 0, idle=False)

    def alive(self, respondent: Respondent, progress: object) -> None:
        self._peers.alive(respondent.name, progress)

    def given_up(self, respondent: Respondent, reason: Exception) -> None:
        with self._changed:
            self.repeated += self._leases.leave(respondent)
        self._peers.given_up(respondent.name, reason)
        logger.error("GPU service %s is given up: %s", respondent.name, reason)
        self._hand_out()

    # between them

    def _member(self, name: str, connect: Connect, again: bool) -> Member:
        return Respondent(name, connect, self, self._channel, again=again)

    def _channel(self, sock: socket.socket) -> Any:
        return self._ways.channel(sock)

    def _take(
        self, respondent: Respondent, task: int, answer: Answer | TrainfleetError, size: int, *, idle: bool
    ) -> None:
        with self._changed:
            self._peers.moved()
            if self._leases.arrived(respondent, task, time.monotonic(), size, idle=idle):
                self._done[task] = answer
                self._waiting_bytes[task] = 0 if isinstance(answer, TrainfleetError) else weight_of(answer)
                self._changed.notify_all()
        self._hand_out()

    def _hand_out(self) -> None:
        with self._changed:
            given = self._leases.give(time.monotonic())
        self._ask(given)

    def _hasten(self, task: int) -> None:
        with self._changed:
            given = self._leases.hasten(task, time.monotonic())
            self.repeated += len(given)
        self._ask(given)

    def _ask(self, given: Sequence[tuple[Hashable, int, Question]]) -> None:
        for respondent, task, question in given:
            assert isinstance(respondent, Respondent)
            respondent.ask(task, question)


def _parsed(message: Message) -> Answer | TrainfleetError:
    head = message.head
    if message.kind == "failed":
        error, hint = head.get("error"), head.get("hint")
        cls = FAILURES.get(str(head.get("kind")), DataError)
        return cls(str(error)[:4000], hint=hint[:1000] if isinstance(hint, str) else None)
    if not isinstance(message.body, dict):
        raise PeerError(f"A GPU service answered with a {type(message.body).__name__}, not arrays by name.")
    return message.body
