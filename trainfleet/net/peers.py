"""`Peers`: how those that one side works with are come by, who of them is here, and why the others are not."""

from __future__ import annotations

import functools
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, Protocol, TypeAlias, TypeVar

from trainfleet.errors import PeerError
from trainfleet.net.address import Address
from trainfleet.net.channel import Channel
from trainfleet.net.credentials import Credentials
from trainfleet.net.dial import dial, peer_of
from trainfleet.net.entrance import Entrance
from trainfleet.net.frames import Limits
from trainfleet.net.listener import Listener
from trainfleet.net.structure import Classes
from trainfleet.net.token import Token, is_token

logger = logging.getLogger(__name__)

_SAY_AFTER = 5.0
"""Seconds of waiting after which the reason is said, once."""
_LOOK = 0.25

Connect: TypeAlias = Callable[[timedelta, threading.Event], socket.socket]


@dataclass(kw_only=True)
class Ways:
    """How peers are come by: those that are called, and where others may call."""

    places: Sequence[str | Address | Token] = ()
    listen: str | Address | None = None
    via: Token | str | None = None
    tunnel: str | None = None
    """A way in to `listen`, as `entrance.Way` reads it."""
    credentials: Credentials | None = None
    told: Callable[[Address | Token], None] | None = None
    """Called with what peers have to dial, once it is known and when it changes."""
    classes: Classes | None = None
    limits: Limits | None = None
    nearby: bool = True

    def channel(self, sock: socket.socket) -> Channel:
        return Channel(sock, limits=self.limits, classes=self.classes, nearby=self.nearby)


class Member(Protocol):
    """One peer, on a line of its own."""

    name: str

    def say_bye(self) -> None: ...

    def close(self) -> None: ...

    def join(self, seconds: float) -> None: ...

    @property
    def is_alive(self) -> bool: ...


AnyMember = TypeVar("AnyMember", bound=Member)


class Peers(Generic[AnyMember]):
    """Opens a member for each place that is called, and for each who calls; `changed` guards what is shared.

    member(name, connect, again)   makes one and starts its line
    role, admits                   what we are, and what they are, for who listens and who dials
    remedy                         what a person does when none is there
    """

    def __init__(
        self,
        ways: Ways,
        member: Callable[[str, Connect, bool], AnyMember],
        *,
        role: str,
        admits: str,
        timeout: timedelta,
        remedy: str,
    ) -> None:
        self.changed = threading.Condition()
        self.lost = 0
        """Connections that ended by themselves."""
        self._ways, self._member, self._role, self._admits = ways, member, role, admits
        self._timeout, self._remedy = timeout.total_seconds(), remedy
        self._here: set[str] = set()
        self._reasons: dict[str, str] = {}  # by name, why it is not here
        self._num_given_up = 0
        self._fatal: Exception | None = None
        self._moved = 0.0  # when anything was last heard that brings an answer nearer
        self._progress: dict[str, object] = {}  # by name, what it last said of its own
        self._closing = threading.Event()
        self._members: list[AnyMember] = []
        self._listener: Listener | None = None
        self._entrance: Entrance | None = None
        self._accepting: threading.Thread | None = None

    def open(self) -> None:
        """Raises what `Listener` and `Entrance` raise, with nothing left open."""
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        ways = self._ways
        if ways.listen is not None or (ways.via is not None and not ways.places):
            self._listener = Listener(
                ways.listen, credentials=ways.credentials, role=self._role, admits=(self._admits,), via=ways.via
            )
            self._accepting = threading.Thread(target=self._accept, name=f"trainfleet-{self._role}", daemon=True)
            self._accepting.start()
            self._tell(self._listener)
        for place in ways.places:
            if isinstance(place, str) and is_token(place):
                place = Token.parse(place)
            # A token is a secret, and is not for the log.
            name = " or ".join(map(str, place.addresses)) or "the relay" if isinstance(place, Token) else str(place)
            self._members.append(self._member(name, functools.partial(self._call, name, place), True))

    def _tell(self, listener: Listener) -> None:
        told, tunnel = self._ways.told or (lambda place: None), self._ways.tunnel
        if tunnel is not None:
            self._entrance = Entrance(tunnel, listener.address.port, moved=lambda place: told(listener.token([place])))
            told(listener.token([self._entrance.address]))
        elif self._ways.via is None:
            told(listener.address)

    @property
    def address(self) -> Address | None:
        """Where peers may connect to, with the port that was chosen; None if they are called."""
        return self._listener.address if self._listener is not None else None

    @property
    def members(self) -> list[AnyMember]:
        return list(self._members)

    def wait(self, met: Callable[[], bool], what: str, meanwhile: Callable[[], None] | None = None) -> None:
        """Until `met` (called with `changed` held). `meanwhile` is called now and then, without it.

        Raises PeerError when nobody was there, or nobody came any further, for the whole timeout; or the error that
        ended the last line.
        """
        since, said = time.monotonic(), False
        while True:
            with self.changed:
                if not met() and self._fatal is None:
                    self.changed.wait(_LOOK)
                if met():
                    return
                if self._fatal is not None:
                    raise self._fatal
                now, here = time.monotonic(), len(self._here)
                late = now - max(since, self._moved) > self._timeout
                why = "; ".join(f"{name}: {text}" for name, text in self._reasons.items())
            if meanwhile is not None:
                meanwhile()
            if late:
                stuck = f"the {here} that are here made no progress" if here else f"no {self._admits} was there"
                raise PeerError(
                    f"Waited {self._timeout:g} s for {what}, and {stuck}. {why or 'None answered.'}", hint=self._remedy
                )
            if not said and now - since > _SAY_AFTER:
                said = True
                logger.warning("Waiting for %s, with %s %s here. %s", what, here or "no", self._admits, why)

    def close(self) -> None:
        self._closing.set()
        if self._listener is not None:
            self._listener.close()
        if self._accepting is not None:
            self._accepting.join(10)
        for member in self._members:
            member.say_bye()
        for member in self._members:
            member.close()
        for member in self._members:
            member.join(10)
        if self._entrance is not None:  # what was said to peers has gone through it
            self._entrance.close()

    # told by the members, on the threads of their lines

    def joined(self, name: str) -> None:
        with self.changed:
            self._here.add(name)
            self._reasons.pop(name, None)
            self._moved = time.monotonic()
            self.changed.notify_all()

    def moved(self) -> None:
        """Something was heard that brings an answer nearer. Call it with `changed` held."""
        self._moved = time.monotonic()

    def alive(self, name: str, progress: object) -> None:
        """It said that it is alive, and how far it is: another value whenever it has come further."""
        with self.changed:
            if progress != self._progress.get(name):
                self._progress[name] = progress
                self._moved = time.monotonic()

    def left(self, name: str, reason: PeerError) -> None:
        with self.changed:
            self._here.discard(name)
            self._reasons[name] = str(reason)
            self.lost += 1
            self.changed.notify_all()

    def given_up(self, name: str, reason: Exception) -> None:
        with self.changed:
            self._here.discard(name)
            self._reasons[name] = str(reason)
            # One that is not admitted is no loss while there are others; anything else would come again and again.
            self._num_given_up += 1
            called = len(self._ways.places)
            if not isinstance(reason, PeerError) or (self._listener is None and called <= self._num_given_up):
                self._fatal = self._fatal or reason
            self.changed.notify_all()

    def _call(
        self, name: str, place: str | Address | Token, timeout: timedelta, closing: threading.Event
    ) -> socket.socket:
        return dial(
            place,
            credentials=self._ways.credentials,
            role=self._role,
            admits=(self._admits,),
            timeout=timeout,
            closing=closing,
            told=functools.partial(self._unreached, name),
        )

    def _unreached(self, name: str, reason: PeerError) -> None:
        with self.changed:
            self._reasons[name] = str(reason)

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._closing.is_set():
            try:
                sock = self._listener.accept(timedelta(seconds=1))
            except TimeoutError:
                continue
            except PeerError:
                return
            self._members = [member for member in self._members if member.is_alive]
            self._members.append(self._member(peer_of(sock).address, lambda *_, sock=sock: sock, False))
