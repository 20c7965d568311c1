"""`Guests`: who is at a service now, and what all who ever were have had of it."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from trainfleet.errors import PeerError
from trainfleet.net.dial import peer_of

logger = logging.getLogger(__name__)


class Visit(Protocol):
    """A connection to one guest."""

    def close(self) -> None:
        """End it, from any thread."""


V = TypeVar("V", bound=Visit)


class Guests(Generic[V]):
    """Receives each guest that a reception lets in.

    receive   a visit, of a socket; PeerError if it is broken already
    attend    returns when the guest has gone; PeerError if it broke off or said what cannot be
    counts    numbers that only grow during a visit, those of batches first
    name      of a guest, in sentences, such as `Trainer`
    most      so many at a time; others are sent away
    """

    def __init__(
        self,
        receive: Callable[[socket.socket], V],
        attend: Callable[[V], None],
        counts: Callable[[V], tuple[int, ...]],
        *,
        name: str,
        most: int | None = None,
    ) -> None:
        self._receive, self._attend, self._counts = receive, attend, counts
        self._name, self._most = name, most
        self._here: dict[V, str] = {}
        self._gone: tuple[int, ...] | None = None  # what those have had who are not here any more
        self._is_closed = False
        self._lock = threading.Lock()

    def meet(self, sock: socket.socket) -> None:
        """Receive and attend one guest, and take leave of it."""
        who = peer_of(sock).address
        try:
            visit = self._receive(sock)
        except PeerError as exc:
            logger.info("%s", exc)
            return
        with self._lock:
            is_full = self._most is not None and len(self._here) >= self._most
            is_wanted = not is_full and not self._is_closed
            if is_wanted:
                self._here[visit] = who
        if is_full:
            logger.warning("%s %s was sent away: %d are served, and no more.", self._name, who, self._most)
        if not is_wanted:
            visit.close()
            return
        logger.info("%s %s is here.", self._name, who)
        try:
            self._attend(visit)
        except PeerError as exc:
            logger.warning("%s %s has gone after %d batches: %s", self._name, who, self._counts(visit)[0], exc)
        else:
            logger.info("%s %s is done: %d batches.", self._name, who, self._counts(visit)[0])
        finally:
            with self._lock:
                self._here.pop(visit)
                self._gone = _sum(self._gone, self._counts(visit))

    @property
    def here(self) -> list[V]:
        with self._lock:
            return list(self._here)

    @property
    def addresses(self) -> list[str]:
        with self._lock:
            return list(self._here.values())

    @property
    def totals(self) -> tuple[int, ...] | None:
        """The counts of all guests, those that have gone too; None before the first."""
        with self._lock:
            totals = self._gone
            for visit in self._here:
                totals = _sum(totals, self._counts(visit))
            return totals

    def close(self) -> None:
        """End all visits, and those that come later."""
        with self._lock:
            self._is_closed = True
            here = list(self._here)
        for visit in here:
            visit.close()


def _sum(totals: tuple[int, ...] | None, more: tuple[int, ...]) -> tuple[int, ...]:
    return more if totals is None else tuple(a + b for a, b in zip(totals, more))
