"""The way to the other side through a relay: a room that the secret names, and that the relay cannot open.

Both sides dial the relay and say the room; from then on the connection belongs to them: TLS to the relay ends (its
`close_notify` both ways), the relay copies bytes, and the two greet each other as if one had dialled the other.
"""

from __future__ import annotations

import hmac
import socket
import ssl
from typing import Literal

from trainfleet.errors import NotAdmitted, PeerError
from trainfleet.net.address import obstacle
from trainfleet.net.credentials import Credentials
from trainfleet.net.hello import read_message, send_message
from trainfleet.net.sockets import set_remaining
from trainfleet.net.token import Token

Side = Literal["listens", "dials"]


def room_of(secret: bytes) -> str:
    """64 hexadecimal digits that say nothing of the secret to who does not know it."""
    return hmac.digest(secret, b"trainfleet relay room", "sha256").hex()


def enter_room(via: Token, room: str, side: Side, ends: float) -> socket.socket:
    """A plain socket whose bytes the relay copies to and from the other side: for who dials at once, else later.

    PeerError where no relay answers, or nobody listens in the room yet; NotAdmitted where the relay does not take us.
    """
    from trainfleet.net.dial import connect  # which itself goes through here for tokens that name a relay

    credentials, errors = Credentials.of(via), []
    for place in via.addresses:
        try:
            sock = connect(place, credentials, role="guest", admits={"relay"}, ends=ends)
        except NotAdmitted:
            raise
        except PeerError as exc:
            errors.append(exc)
            continue
        try:
            send_message(sock, {"room": room, "side": side}, ends)
            read_message(sock, ends, str(place))  # a refusal raises
            return without_tls(sock, ends)
        except TimeoutError:
            sock.close()
            errors.append(PeerError(f"{place} has nobody who listens in the room of our token, or says nothing."))
        except OSError as exc:
            sock.close()
            errors.append(PeerError(f"The relay at {place} broke off: {obstacle(exc)}"))
        except BaseException:
            sock.close()
            raise
    try:
        raise errors[-1]
    finally:
        errors.clear()  # each holds this frame by its traceback, and the frame would hold them


def without_tls(sock: socket.socket, ends: float) -> socket.socket:
    """The same connection after both sides have ended its TLS; not one byte of what comes next is lost.

    OpenSSL reads a record at a time, and no further (`read_ahead` is off unless asked for).
    """
    if not isinstance(sock, ssl.SSLSocket):
        return sock
    set_remaining(sock, ends)
    sock.unwrap()
    return socket.socket(fileno=sock.detach())
