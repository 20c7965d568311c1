"""DataService: a feeder. It makes the batches that trainers ask for, on as many connections as there are."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from trainfleet.data.crew import Workers
from trainfleet.data.feed.session import Session
from trainfleet.data.feed.stock import Stock
from trainfleet.data.feed.times import Spent, Times
from trainfleet.data.feed.workshop import Workshop
from trainfleet.data.loader import LocalBatches
from trainfleet.net.address import Address
from trainfleet.net.channel import Channel
from trainfleet.net.credentials import Credentials
from trainfleet.net.frames import Limits
from trainfleet.net.guests import Guests
from trainfleet.net.reception import Reception
from trainfleet.net.service import Service
from trainfleet.net.token import Token


class Served(NamedTuple):
    """What a service has done since it opened, and is asked for now."""

    batches: int
    num_bytes: int
    trainers: int
    """Connections: one a rank and stream."""
    waiting: int
    """Batches that are asked for and that no worker has begun."""
    workers: int
    spent: Spent
    """Where their time went."""
    reached: tuple[int, int] | None
    """Epoch and position to which the farthest of the trainers that are here was fed; None where none is."""


class DataService(Service[Session]):
    """Makes the batches of `training`, and of `evaluation` where there is one, for whoever asks with our secret.

        DataService(LocalBatches(dataset, size=64, workers=32, transform=augment)).serve()

    The streams are never iterated: what they say of source, transform, workers and order is what trainers get, who
    decide on size, seed and order where they want others. Each trainer's place is its own, so that one service feeds
    several runs. Without workers there is one process all the same: to make samples is to seed global random
    generators, from which this process may draw too.

    address       where to listen, host:port; None: nowhere
    dials         trainers that listen themselves, by address or token, to whom this side connects, again and again
    via           token of a relay where trainers come to, because neither side can be reached
    credentials   none is enough on loopback; else `Credentials.make()`, whose token goes to the trainers

    `open` returns once it listens, `serve` when the service is closed or Ctrl-C is pressed. Raises ConfigError for a
    port in use, an address of others, and an address off loopback without credentials.
    """

    def __init__(
        self,
        training: LocalBatches,
        *,
        evaluation: LocalBatches | None = None,
        address: str | Address | None = "127.0.0.1:7700",
        dials: Sequence[str | Address | Token] = (),
        via: Token | str | None = None,
        credentials: Credentials | None = None,
        limits: Limits | None = None,
    ) -> None:
        streams = {"training": training} | ({"evaluation": evaluation} if evaluation is not None else {})
        self.stock = Stock(streams)
        self._workers, self._limits = training.crew, limits or Limits()
        guests = Guests(
            self._receive,
            lambda session: session.run(self._words),
            lambda session: (session.num_units, session.num_bytes),
            name="Trainer",
        )
        super().__init__(
            guests,
            Reception(
                guests.meet,
                role="feeder",
                guest="trainer",
                address=address,
                dials=dials,
                via=via,
                credentials=credentials,
            ),
        )
        self._times = Times()
        self._opened = ExitStack()

    def _begin(self) -> None:
        assert isinstance(self._workers, Workers)
        self.offers = self.stock.offers()
        words = {name: offer.to_plain() for name, offer in self.offers.items()}
        self._words = {"streams": words, "host": socket.gethostname(), "workers": max(1, self._workers.workers)}
        crew = replace(self._workers, maker=self.stock, workers=max(1, self._workers.workers))
        self._workshop = Workshop(crew)
        self._opened.callback(self._workshop.close)

    def _end(self) -> None:
        self._opened.close()

    @property
    def trainers(self) -> list[str]:
        """The addresses of those who are connected."""
        return self.guests.addresses

    @property
    def served(self) -> Served:
        sessions = self.guests.here
        batches, num_bytes = self.guests.totals or (0, 0)
        return Served(
            batches=batches,
            num_bytes=num_bytes,
            trainers=len(sessions),
            waiting=self._workshop.waiting,
            workers=len(self._workshop.pids),
            spent=self._times.spent,
            reached=max((session.reached for session in sessions if session.reached), default=None),
        )

    @property
    def worker_pids(self) -> list[int]:
        return self._workshop.pids

    def _receive(self, sock: socket.socket) -> Session:
        return Session(Channel(sock, limits=self._limits), self.stock, self._workshop, self._times)
