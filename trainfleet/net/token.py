"""One line to copy: where to dial, the secret, and the certificate to expect there; no CA has to be set up."""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainfleet.errors import ConfigError, NotAdmitted
from trainfleet.net.address import Address

PREFIX = "tf1_"
SECRET_BYTES = 16
FINGERPRINT_BYTES = 32  # of SHA-256
_CHECK_BYTES = 4
_MOST_CHARACTERS = 4096
_MOST_ADDRESSES = 16
_REMEDY = "Copy the whole line that the other side printed."


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """Whoever holds it may connect; print it to the person, and nowhere else.

    As text: `tf1_` and base32 of length (2 bytes), addresses, secret, fingerprint, relay, and four bytes of SHA-256
    over these; letters and digits only, so that a double click takes it whole.
    """

    addresses: tuple[Address, ...]
    """Where the same listener may be reached, tried in this order. None: through the relay only."""
    secret: bytes = field(repr=False)
    fingerprint: bytes | None = None
    """SHA-256 of the listener's certificate; None: no TLS, which is for loopback only."""
    via: Token | None = None
    """The token of a relay that both sides dial."""

    def __post_init__(self) -> None:
        if not SECRET_BYTES <= len(self.secret) <= 255:
            raise ConfigError(
                f"The secret has {len(self.secret)} bytes; it needs {SECRET_BYTES} to 255, "
                "such as secrets.token_bytes(16) gives."
            )
        if self.fingerprint is not None and len(self.fingerprint) != FINGERPRINT_BYTES:
            raise ConfigError(
                f"The fingerprint has {len(self.fingerprint)} bytes; one of SHA-256 has {FINGERPRINT_BYTES}."
            )
        if len(self.addresses) > _MOST_ADDRESSES:
            raise ConfigError(f"A token names {len(self.addresses)} addresses; {_MOST_ADDRESSES} is the most.")
        if not self.addresses and self.via is None:
            raise ConfigError("A token has to name an address or a relay.")
        if self.via is not None and (self.via.via is not None or not self.via.addresses):
            raise ConfigError("The token of a relay names its addresses, and no further relay.")
        if self.fingerprint is None and (self.via is not None or not all(a.is_loopback for a in self.addresses)):
            raise ConfigError("A token without a fingerprint is for loopback only: nothing would be encrypted.")

    @classmethod
    def make(
        cls,
        addresses: Sequence[Address | str] = (),
        *,
        fingerprint: bytes | None,
        secret: bytes | None = None,
        via: Token | None = None,
    ) -> Token:
        """A token with a new secret, unless one is given."""
        places = tuple(Address.parse(address) for address in addresses)
        return cls(
            addresses=places, secret=secret or secrets.token_bytes(SECRET_BYTES), fingerprint=fingerprint, via=via
        )

    @classmethod
    def parse(cls, text: str) -> Token:
        """The token of a line, whatever spaces and breaks are in it; NotAdmitted says what is wrong with a copy."""
        line = "".join(text[: 2 * _MOST_CHARACTERS].split())
        if not line.startswith(PREFIX):
            raise NotAdmitted(f"A token begins with {PREFIX}, and this one with {line[:8]!r}.", hint=_REMEDY)
        letters = line[len(PREFIX) :]
        if len(letters) > _MOST_CHARACTERS:
            raise NotAdmitted(f"This token has over {_MOST_CHARACTERS} characters, which none has.", hint=_REMEDY)
        return _check(letters)

    def __str__(self) -> str:
        body = _encode(self)
        sized = (len(body) + _CHECK_BYTES).to_bytes(2, "big") + body
        return PREFIX + _letters(sized + _digest(sized))


def is_token(text: str) -> bool:
    """Whether a text means to be a token, as against an address."""
    return text.lstrip().startswith(PREFIX)


def _letters(raw: bytes) -> str:
    return base64.b32encode(raw).decode().rstrip("=").lower()


def _digest(sized: bytes) -> bytes:
    return hashlib.sha256(sized).digest()[:_CHECK_BYTES]


def _check(letters: str) -> Token:
    damaged = "Characters of this token are not those that were printed."
    if strange := sorted(set(letters) - set("abcdefghijklmnopqrstuvwxyz234567")):
        raise NotAdmitted(f"{damaged} There is {strange[0]!r} in it, which no token has.", hint=_REMEDY)
    whole = len(letters) // 8 * 8
    rest = letters[whole:] + "=" * (-len(letters) % 8)
    try:
        raw = base64.b32decode(letters[:whole].upper())
    except binascii.Error as exc:  # pragma: no cover - whole blocks of the alphabet always decode
        raise NotAdmitted(damaged, hint=_REMEDY) from exc
    expected = int.from_bytes(raw[:2], "big") + 2
    characters = -(-expected * 8 // 5)
    if len(raw) < 2 or (len(letters) < characters <= _MOST_CHARACTERS):
        have = f"{len(letters) + len(PREFIX)} of {characters + len(PREFIX)}" if len(raw) >= 2 else f"{len(letters)}"
        raise NotAdmitted(f"This token is cut off: there are {have} characters.", hint=_REMEDY)
    try:
        raw += base64.b32decode(rest.upper())
    except binascii.Error as exc:
        raise NotAdmitted(damaged, hint=_REMEDY) from exc
    # The last letter may have bits that no byte has.
    if len(raw) != expected or raw[-_CHECK_BYTES:] != _digest(raw[:-_CHECK_BYTES]) or _letters(raw) != letters:
        raise NotAdmitted(damaged, hint=_REMEDY)
    reader = _Reader(raw[2:-_CHECK_BYTES])
    try:
        token = _decode(reader)
    except (ConfigError, ValueError) as exc:
        raise NotAdmitted(f"This token says what cannot be: {exc}", hint=_REMEDY) from exc
    if reader.rest:
        raise NotAdmitted("This token is of another version of trainfleet. Use the same on both sides.")
    return token


def _encode(token: Token) -> bytes:
    parts = [bytes([len(token.addresses)])]
    for address in token.addresses:
        try:
            number = ipaddress.IPv4Address(address.host).packed
            parts += [b"\0", number]
        except ValueError:
            parts += [bytes([len(address.host)]), address.host.encode("ascii")]
        parts.append(address.port.to_bytes(2, "big"))
    parts += [bytes([len(token.secret)]), token.secret]
    parts += [b"\1", token.fingerprint] if token.fingerprint is not None else [b"\0"]
    parts += [b"\1", _encode(token.via)] if token.via is not None else [b"\0"]
    return b"".join(parts)


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self.rest = raw

    def take(self, count: int) -> bytes:
        if count > len(self.rest):
            raise ValueError("it ends too early.")
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def name(self, length: int) -> str:
        try:
            return self.take(length).decode("ascii")
        except UnicodeDecodeError:
            raise ValueError("a host's name in it is not of ASCII letters.") from None

    def number(self, *, most: int = 255) -> int:
        value = self.take(1)[0]
        if value > most:
            raise ValueError("a number in it is too large.")
        return value


def _decode(reader: _Reader, *, may_have_relay: bool = True) -> Token:
    addresses = []
    for _ in range(reader.number(most=_MOST_ADDRESSES)):
        length = reader.number()
        host = reader.name(length) if length else str(ipaddress.IPv4Address(reader.take(4)))
        addresses.append(Address(host, int.from_bytes(reader.take(2), "big")))
    secret = reader.take(reader.number())
    fingerprint = reader.take(FINGERPRINT_BYTES) if reader.number(most=1) else None
    via = _decode(reader, may_have_relay=False) if reader.number(most=int(may_have_relay)) else None
    return Token(addresses=tuple(addresses), secret=secret, fingerprint=fingerprint, via=via)
