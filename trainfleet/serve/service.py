"""ModelService: a model that stands where the GPU is, and answers for the batches of whoever asks with our secret."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from trainfleet.batch import Batch
from trainfleet.errors import ConfigError
from trainfleet.net.address import Address
from trainfleet.net.channel import Channel
from trainfleet.net.credentials import Credentials
from trainfleet.net.frames import Limits
from trainfleet.net.guests import Guests
from trainfleet.net.reception import Reception
from trainfleet.net.service import Service
from trainfleet.net.structure import allow
from trainfleet.net.token import Token
from trainfleet.serve.offer import Offer
from trainfleet.serve.session import Session
from trainfleet.serve.terms import Answer, Terms
from trainfleet.serve.turns import Turns

ROLE = "gpu-service"
GUEST = "client"
MOST_CLIENTS = 64


class Model(Protocol):
    """What answers here, such as a Predictor."""

    @property
    def digest(self) -> str:
        """Of the weights."""

    def answer(self, batch: Batch, terms: Terms) -> Answer: ...


class Served(NamedTuple):
    """What a service has done since it opened, and what it has to do now."""

    batches: int
    """Answered, with those that failed."""
    failed: int
    rows: int
    num_bytes: int
    """Batches and answers."""
    busy_seconds: float
    """In the model, with the copies to its device and back."""
    clients: int
    """Connections."""
    waiting: int
    """Batches that are here and have not had their turn."""
    held_bytes: int
    """Of batches that are here."""


class ModelService(Service[Session]):
    """Answers `validate` and `predict` of clients on other hosts; they have the data, and their place in it.

        ModelService(Predictor(model, device="cuda")).serve()

    A batch is a question, and its answer a pure function of weights, batch and terms: nothing is remembered, so a
    client may ask any service of the same weights, and again. One thread computes, a batch of each connection in turn.

    predictor     has `digest` and `answer(batch, terms)`
    address       where to listen, host:port; None: nowhere
    dials         clients that listen themselves, by address or token, to whom this side connects, again and again
    via           token of a relay where clients come to, because neither side can be reached
    credentials   none is enough on loopback; else `Credentials.make()`, whose token goes to the clients
    classes       dataclasses and named tuples that batches may be made of
    window_bytes  of batches that one connection may have here without an answer, and of answers that wait to be sent;
                  one of each may be larger. At most 64 connections are served at a time

    A batch that fails is told to who sent it, and the service goes on. `open` returns once it listens, `serve` when
    the service is closed or Ctrl-C is pressed. Raises ConfigError for a port in use, an address of others, and an
    address off loopback without credentials.
    """

    def __init__(
        self,
        predictor: Model,
        *,
        address: str | Address | None = "127.0.0.1:7800",
        dials: Sequence[str | Address | Token] = (),
        via: Token | str | None = None,
        credentials: Credentials | None = None,
        classes: Sequence[type] = (),
        window_bytes: int = 1 << 28,
        limits: Limits | None = None,
    ) -> None:
        if window_bytes < 1:
            raise ConfigError(f"window_bytes is {window_bytes}; it must be more than nothing.")
        self.predictor = predictor
        self._classes, self._window_bytes, self._limits = allow(*classes), window_bytes, limits or Limits()
        guests = Guests(
            self._receive,
            lambda session: session.run(),
            lambda session: (session.num_batches, session.num_rows, session.num_bytes),
            name="Client",
            most=MOST_CLIENTS,
        )
        super().__init__(
            guests,
            Reception(
                guests.meet, role=ROLE, guest=GUEST, address=address, dials=dials, via=via, credentials=credentials
            ),
        )
        self._turns: Turns | None = None

    def _begin(self) -> None:
        self.offer = _offer_of(self.predictor, self._window_bytes)
        self._turns = Turns(self.predictor.answer)

    def _end(self) -> None:
        if self._turns is not None:
            self._turns.close()

    @property
    def clients(self) -> list[str]:
        """The addresses of those who are connected."""
        return self.guests.addresses

    @property
    def served(self) -> Served:
        turns = self._turns
        assert turns is not None, "it is open"
        here = self.guests.here
        batches, rows, num_bytes = self.guests.totals or (0, 0, 0)
        return Served(
            batches=batches,
            failed=turns.num_failed,
            rows=rows,
            num_bytes=num_bytes,
            busy_seconds=turns.busy_seconds,
            clients=len(here),
            waiting=turns.waiting,
            held_bytes=sum(session.held_bytes for session in here),
        )

    def _receive(self, sock: socket.socket) -> Session:
        assert self._turns is not None
        return Session(Channel(sock, limits=self._limits, classes=self._classes), self.offer, self._turns)


def _offer_of(predictor: Any, room: int) -> Offer:
    model = getattr(predictor, "model", predictor)
    return Offer(
        digest=predictor.digest,
        model=type(model).__name__,
        device=str(getattr(predictor, "device", "cpu")),
        classes=getattr(predictor, "classes", None) or 0,
        room=room,
    )
