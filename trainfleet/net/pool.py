"""`Pool`: units of work for whichever of many peers is free; none is lost with a peer, and the first answer counts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Generic, Protocol, TypeVar

from trainfleet.errors import PeerError
from trainfleet.net.address import Address
from trainfleet.net.lease import Leases
from trainfleet.net.peers import Connect, Member, Peers, Ways

logger = logging.getLogger(__name__)

Unit = TypeVar("Unit")
Found = TypeVar("Found")


class Asked(Member, Protocol):
    """A peer that does units of work."""

    def ask(self, task: int, unit: Any, /) -> None:
        """Without an answer if the connection is gone: its thread hears that too."""

    def forget(self) -> None:
        """Nothing that it was asked for is wanted any more."""


class Pool(Generic[Unit, Found]):
    """Tasks go in by `submit` and come out by `take`, each once; peers are asked, and tell `take_in` what they found.

    member(name, connect, again)   makes one and starts its line
    role, admits, remedy           as `Peers` takes them
    called                         what log and errors call one of them: `Feeder`
    """

    def __init__(
        self,
        ways: Ways,
        member: Callable[[str, Connect, bool], Asked],
        *,
        role: str,
        admits: str,
        called: str,
        timeout: timedelta,
        remedy: str,
    ) -> None:
        self.repeated = 0
        """Units that were asked for anew, of another peer or the same."""
        self.seconds_waited = 0.0
        """Of who takes: for what was not here yet."""
        self._peers = Peers(ways, member, role=role, admits=admits, timeout=timeout, remedy=remedy)
        self._called, self._changed = called, self._peers.changed
        self._leases: Leases[Asked, Unit] = Leases()
        self._done: dict[int, Found] = {}

    @property
    def address(self) -> Address | None:
        """Where peers may connect to, with the port that was chosen; None if they are called."""
        return self._peers.address

    @property
    def connected(self) -> int:
        """Peers that are here."""
        return self._leases.peers

    @property
    def lost(self) -> int:
        """Connections that ended by themselves."""
        return self._peers.lost

    def submit(self, task: int, unit: Unit) -> None:
        with self._changed:
            self._leases.add(task, unit)
        self._hand_out()

    def has(self, task: int) -> bool:
        """Whether it is here."""
        return task in self._done

    def take(self, task: int, what: str) -> Found:
        """What was found of a submitted task. Raises PeerError when no peer was there, or none came any further, for
        the whole timeout; `what` is waited for, in words."""
        begun = time.monotonic()
        try:
            self._peers.wait(lambda: task in self._done, what, lambda: self._hasten(task))
        finally:
            self.seconds_waited += time.monotonic() - begun
        with self._changed:
            return self._done.pop(task)

    def drop(self, tasks: Sequence[int]) -> None:
        """Submitted tasks that are not wanted. Peers are told where nothing else is wanted of them; else what they find
        is thrown away here."""
        with self._changed:
            self._leases.drop(tasks)
            for task in tasks:
                self._done.pop(task, None)
            idle = not len(self._leases)
        for member in self._peers.members if idle else ():
            member.forget()

    def close(self) -> None:
        self._peers.close()
        with self._changed:
            self._leases.clear()
            self._done.clear()

    # on the threads of the peers

    def take_in(self, member: Asked, task: int, found: Found, num_bytes: int, *, idle: bool) -> None:
        """What a peer found, if anybody wants it still; `idle` where it had nothing else to do."""
        with self._changed:
            self._peers.moved()
            if self._leases.arrived(member, task, time.monotonic(), num_bytes, idle=idle):
                self._keep(task, found)
                self._changed.notify_all()
        self._hand_out()

    def left(self, member: Asked, reason: PeerError) -> None:
        with self._changed:
            here = self._leases.peers
            back = self._leases.leave(member)
            was_here = self._leases.peers < here
            self.repeated += back
        self._peers.left(member.name, reason)
        if was_here:  # else the reason is said when somebody has waited for a while
            told = f"{self._called} %s is gone: %s %d batches are asked of others."
            logger.warning(told, member.name, reason, back)
        self._hand_out()

    def alive(self, member: Asked, progress: object) -> None:
        """`progress`: another value whenever it has come further."""
        self._peers.alive(member.name, progress)

    def given_up(self, member: Asked, reason: Exception) -> None:
        """It will not be tried again."""
        with self._changed:
            self.repeated += self._leases.leave(member)
        self._peers.given_up(member.name, reason)
        logger.error(f"{self._called} %s is given up: %s", member.name, reason)
        self._hand_out()

    # between them

    def _keep(self, task: int, found: Found) -> None:
        """Until it is taken. Called with `_changed` held."""
        self._done[task] = found

    def _hand_out(self) -> None:
        with self._changed:
            given = self._leases.give(time.monotonic())
        self._ask(given)

    def _hasten(self, task: int) -> None:
        with self._changed:
            given = self._leases.hasten(task, time.monotonic())
            self.repeated += len(given)
        self._ask(given)

    def _ask(self, given: Sequence[tuple[Asked, int, Unit]]) -> None:
        for member, task, unit in given:  # not under the lock: a peer may be slow to take it
            member.ask(task, unit)
