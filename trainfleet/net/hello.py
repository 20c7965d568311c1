"""The first words of a connection: versions, roles, and the proof that both sides know the secret.

    dialler                                            listener
    {protocol, version, role, nonce, secret?}  ────>
                                               <────   {protocol, version, role, nonce, secret?}
    {proof}                                    ────>   compared in constant time, before it proves anything itself
                                               <────   {proof} or {refused}

A proof is HMAC-SHA256 with the secret over the side's name, the fingerprint of the listener's certificate as that side
sees it, and both hellos as they were sent. So neither learns the secret, and a proof is worth nothing on another
connection, in the other direction, or behind another certificate. (TLS 1.3 has an exporter made for such bindings,
RFC 9266, which Python's ssl does not offer; the certificate is pinned or verified before the first word instead.)
Each message is `tf`, its length in two bytes, and JSON of at most 1 KiB.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from trainfleet.deps import installed
from trainfleet.errors import NotAdmitted, PeerError
from trainfleet.net.sockets import read_exactly, set_remaining

PROTOCOL = 1
"""Raised whenever what is said between two sides changes."""
MAGIC = b"tf"
_MOST_BYTES = 1024
_NONCE_BYTES = 32
_ROLE = re.compile(r"[a-z][a-z0-9-]{0,31}\Z")
_NONCE = re.compile(rf"[0-9a-f]{{{2 * _NONCE_BYTES}}}\Z")
_VERSION = re.compile(r"[0-9A-Za-z.+!-]{1,64}\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Who is at the other end, as far as it proved or said."""

    role: str
    """Such as `feeder` or `trainer`; its own word."""
    version: str
    """Of its trainfleet; its own word."""
    address: str
    proved: bool
    """Whether it knows the secret, or showed a certificate of our CA. False on loopback without credentials."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manners:
    """What a side says of itself, and whom it talks to."""

    role: str
    admits: Collection[str] | None
    """Roles of the other side; None: any."""
    secret: bytes | None
    fingerprint: bytes | None
    """Of the listener's certificate, as this side sees it; None on a plain connection."""
    certified: bool
    """Whether TLS has checked the other side's certificate against a CA."""
    address: str
    """The other side, for sentences."""


REFUSALS = {
    "secret": "says that our secret is not its own",
    "no secret": "wants a secret, and we have none",
    "role": "does not talk to our role",
    "protocol": "runs another version of trainfleet",
    "tls": "wants TLS, and we spoke without: give its token or certificates",
    "busy": "has too many connections waiting",
    "room": "has nobody who listens in the room of our token",
}
"""Reasons that a refusal may give; words of a peer are never shown as they are."""


def send_message(sock: socket.socket, message: dict[str, Any], ends: float) -> bytes:
    """Send one message; its bytes."""
    body = json.dumps(message, separators=(",", ":")).encode()
    assert len(body) <= _MOST_BYTES
    set_remaining(sock, ends)
    sock.sendall(MAGIC + len(body).to_bytes(2, "big") + body)
    return body


def read_message(sock: socket.socket, ends: float, address: str) -> tuple[dict[str, Any], bytes]:
    """One message and its bytes; PeerError for what is none, NotAdmitted for a refusal, OSError as it comes."""
    head = read_exactly(sock, 4, ends)
    length = int.from_bytes(head[2:], "big")
    if head[:2] != MAGIC or length > _MOST_BYTES:
        raise _foreign(address)
    body = read_exactly(sock, length, ends)
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise _foreign(address) from exc
    if not isinstance(message, dict):
        raise _foreign(address)
    if "refused" in message:
        reason = message["refused"]
        said = REFUSALS.get(reason) if isinstance(reason, str) else None
        kind = PeerError if reason in ("busy", "room") else NotAdmitted
        raise kind(f"{address} {said or 'refuses us'}.")
    return message, body


def _foreign(address: str) -> PeerError:
    return PeerError(
        f"What is at {address} does not speak like trainfleet.", hint="Another program may have that port."
    )


def introduce(sock: socket.socket, ours: Manners, ends: float) -> Peer:
    """Say the first words as the side that dialled; who the other is, once it has proved itself."""
    mine = send_message(sock, _hello(ours), ends)
    theirs, heard = read_message(sock, ends, ours.address)
    peer, _, error = _judge(theirs, ours)
    if error is not None:
        raise error
    transcript = _transcript(ours, mine, heard)
    send_message(sock, {"proof": _proof(ours, b"dialler", transcript)}, ends)
    answer, _ = read_message(sock, ends, ours.address)
    if not _is_proof(answer, _proof(ours, b"listener", transcript)):
        raise _wrong_secret(ours)
    return peer


def receive(sock: socket.socket, ours: Manners, ends: float, *, slow: Callable[[], object]) -> Peer:
    """Hear the first words as the side that listened; `slow` is called before a wrong secret is answered.

    Raises NotAdmitted after the other side was told why.
    """
    theirs, heard = read_message(sock, ends, ours.address)
    mine = send_message(sock, _hello(ours), ends)
    peer, reason, error = _judge(theirs, ours)
    if error is None:
        transcript = _transcript(ours, heard, mine)
        answer, _ = read_message(sock, ends, ours.address)
        if _is_proof(answer, _proof(ours, b"dialler", transcript)):
            send_message(sock, {"proof": _proof(ours, b"listener", transcript)}, ends)
            return peer
        slow()
        reason, error = "secret", _wrong_secret(ours)
    send_message(sock, {"refused": reason}, ends)
    raise error


def _hello(ours: Manners) -> dict[str, Any]:
    return {
        "protocol": PROTOCOL,
        "version": installed("trainfleet") or "unknown",
        "role": ours.role,
        "nonce": secrets.token_hex(_NONCE_BYTES),
        "secret": ours.secret is not None,
    }


def _judge(theirs: dict[str, Any], ours: Manners) -> tuple[Peer, str, NotAdmitted | None]:
    """The other side by its hello, and if it may not stay, the reason for it and the sentence for us."""
    protocol, version = theirs.get("protocol"), theirs.get("version")
    role, nonce, secret = theirs.get("role"), theirs.get("nonce"), theirs.get("secret")
    if type(protocol) is not int or not isinstance(version, str) or not _VERSION.match(version):
        raise _foreign(ours.address)
    peer = Peer(role="", version=version, address=ours.address, proved=False)
    if protocol != PROTOCOL:  # what else it says may mean something else
        return (
            peer,
            "protocol",
            NotAdmitted(
                f"{ours.address} runs trainfleet {version} (protocol {protocol % 1_000_000}), and we run "
                f"{installed('trainfleet')} (protocol {PROTOCOL}).",
                hint="Install the same version on both sides.",
            ),
        )
    if not isinstance(role, str) or not _ROLE.match(role) or type(secret) is not bool:
        raise _foreign(ours.address)
    if not isinstance(nonce, str) or not _NONCE.match(nonce):
        raise _foreign(ours.address)
    peer = Peer(role=role, version=version, address=ours.address, proved=ours.secret is not None or ours.certified)
    if ours.admits is not None and role not in ours.admits:
        wanted = " or ".join(sorted(ours.admits))
        return peer, "role", NotAdmitted(f"{ours.address} is a {role}; we, a {ours.role}, talk to a {wanted}.")
    if secret and ours.secret is None:
        return peer, "no secret", NotAdmitted(f"{ours.address} wants a secret, and we have none. Give its token.")
    if ours.secret is not None and not secret:
        return peer, "no secret", NotAdmitted(f"{ours.address} knows no secret, and we want the one of the token.")
    return peer, "", None


def _wrong_secret(ours: Manners) -> NotAdmitted:
    return NotAdmitted(
        f"{ours.address} does not know our secret.",
        hint="Both sides need the same token: the one that was printed last.",
    )


def _transcript(ours: Manners, dialler: bytes, listener: bytes) -> bytes:
    digest = hashlib.sha256(b"trainfleet hello 1\0")
    for part in (ours.fingerprint or b"", dialler, listener):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


def _proof(ours: Manners, side: bytes, transcript: bytes) -> str:
    """Hexadecimal; empty where no secret was agreed on."""
    return hmac.new(ours.secret, side + b"\0" + transcript, "sha256").hexdigest() if ours.secret is not None else ""


def _is_proof(message: dict[str, Any], expected: str) -> bool:
    proof = message.get("proof")
    return isinstance(proof, str) and proof.isascii() and hmac.compare_digest(proof, expected)
