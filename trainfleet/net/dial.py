"""`dial(where, credentials=..., role=..., timeout=...)`: a connected, authenticated socket to who listens there.

    dial(to: Address | str | Token, *, credentials: Credentials | None = None, role: str,
         admits: Collection[str] | None = None, timeout: timedelta, via: Token | None = None,
         closing: Event | None = None) -> socket.socket
    Listener(address: Address | str, *, credentials: Credentials = Credentials(), role: str,
         admits: Collection[str] | None = None, ...)                 # listener.py
        .accept(timeout: timedelta) -> socket.socket  .address -> Address  .token(...) -> Token  .close()
    peer_of(sock) -> Peer                                            # role, version, address, proved

What comes back is blocking, without a timeout: an ssl.SSLSocket where the credentials say TLS, and plain otherwise,
which only loopback may be. OpenSSL's connections are not for two threads at once, and mix up bytes if they are: give
the socket to a Channel (channel.py), or keep it to one thread.
"""

from __future__ import annotations

import functools
import socket
import ssl
import time
import weakref
from collections.abc import Callable, Collection
from datetime import timedelta
from threading import Event

from trainfleet.errors import ConfigError, NotAdmitted, PeerError
from trainfleet.net.address import Address, obstacle
from trainfleet.net.credentials import Credentials
from trainfleet.net.hello import Manners, Peer, introduce
from trainfleet.net.retry import wait_for
from trainfleet.net.room import enter_room, room_of
from trainfleet.net.sockets import tune
from trainfleet.net.tls import check_fingerprint, peer_fingerprint, refusal, start_tls
from trainfleet.net.token import Token, is_token
from trainfleet.net.tunnel import near_end

_TRY_SECONDS = 10.0

_peers: weakref.WeakKeyDictionary[socket.socket, Peer] = weakref.WeakKeyDictionary()


def dial(
    to: Address | str | Token,
    *,
    credentials: Credentials | None = None,
    role: str,
    admits: Collection[str] | None = None,
    timeout: timedelta,
    via: Token | None = None,
    closing: Event | None = None,
    told: Callable[[PeerError], None] | None = None,
) -> socket.socket:
    """A socket to the listener at `to`, an address or a token (as text too), whose credentials go before those given.

    role: what we are, such as `trainer`. admits: roles the other side may have; None: any.
    via: the token of a relay, where `to` does not name one; tried last. told: as `wait_for` has it.
    Tries again until `timeout`, or until `closing` is set: PeerError with the last reason. NotAdmitted at once for
    wrong credentials, roles or versions; ConfigError for what would be sent in plain to another host. Nothing stays
    open then.
    """
    if isinstance(to, str) and is_token(to):
        to = Token.parse(to)
    if isinstance(to, Token):
        places, via, credentials = to.addresses, via or to.via, Credentials.of(to)
    else:
        places, credentials = (Address.parse(to),), credentials or Credentials()
    for place in places:
        credentials.check_dials(place)

    def attempt(left: float) -> socket.socket:
        ends, errors = time.monotonic() + left, []
        ways = [functools.partial(connect, place) for place in places]
        if via is not None:
            ways.append(functools.partial(connect_through, via))
        for way in ways:
            try:
                # Each has a time of its own, so that the next has a chance where packets were swallowed.
                return way(credentials, role=role, admits=admits, ends=min(ends, time.monotonic() + _TRY_SECONDS))
            except NotAdmitted:
                raise
            except PeerError as exc:
                errors.append(exc)
        try:
            raise errors[-1]
        finally:
            errors.clear()  # each holds this frame by its traceback, and the frame would hold them

    names = [str(place) for place in places] + ([f"the relay {via.addresses[0]}"] if via is not None else [])
    return wait_for(f"the listener at {' or '.join(names)}", attempt, timeout=timeout, closing=closing, told=told)


def peer_of(sock: socket.socket) -> Peer:
    """Who is at the other end of a socket that `dial` or `Listener.accept` gave; KeyError for other sockets."""
    return _peers[sock]


def remember(sock: socket.socket, peer: Peer) -> socket.socket:
    """`sock`, of which `peer_of` now knows."""
    _peers[sock] = peer
    return sock


def connect(
    place: Address, credentials: Credentials, *, role: str, admits: Collection[str] | None, ends: float
) -> socket.socket:
    """One try to reach who listens at `place`, until `ends` of the monotonic clock."""
    near = near_end(place, timeout=timedelta(seconds=max(0.001, ends - time.monotonic())))
    try:
        sock = socket.create_connection((near.host, near.port), timeout=max(0.001, ends - time.monotonic()))
    except OSError as exc:
        raise PeerError(
            f"{place} cannot be reached: {obstacle(exc)}", hint="Is the other side running, and is that its address?"
        ) from exc
    return _greet(sock, place, credentials, role, admits, ends)


def connect_through(
    via: Token, credentials: Credentials, *, role: str, admits: Collection[str] | None, ends: float
) -> socket.socket:
    """One try to reach who listens in the room of our secret at a relay."""
    if credentials.secret is None or not credentials.tls:
        raise ConfigError("The way through a relay needs a token: its secret names the room, and TLS keeps it private.")
    sock = enter_room(via, room_of(credentials.secret), "dials", ends)
    return _greet(sock, via.addresses[0], credentials, role, admits, ends)


def _greet(
    sock: socket.socket,
    place: Address,
    credentials: Credentials,
    role: str,
    admits: Collection[str] | None,
    ends: float,
) -> socket.socket:
    """`sock`, connected to who listens at `place`, with TLS and the first words done; closed if they fail."""
    try:
        tune(sock)
        shown, context = None, credentials.client_context()
        if context is not None:
            sock = start_tls(context, sock, name=place.host, ends=ends)
            if credentials.expected is not None:
                check_fingerprint(sock, credentials.expected, str(place))
            shown = peer_fingerprint(sock)
        ours = Manners(
            role=role,
            admits=admits,
            secret=credentials.secret,
            fingerprint=shown,
            certified=credentials.certificates is not None,
            address=str(place),
        )
        peer = introduce(sock, ours, ends)
        sock.settimeout(None)
        return remember(sock, peer)
    except BaseException as exc:
        sock.close()
        if isinstance(exc, ssl.SSLError) and (refused := refusal(exc, str(place))) is not None:
            raise refused from exc
        if isinstance(exc, OSError):
            if isinstance(exc, TimeoutError):
                raise PeerError(f"{place} was reached, but did not answer in time.") from exc
            raise PeerError(
                f"{place} was reached, but broke off: {obstacle(exc)}",
                hint="It may want TLS or other credentials, be too busy, or not be trainfleet.",
            ) from exc
        raise
