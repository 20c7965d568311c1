"""What one side shows, and what it wants of the other."""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainfleet.errors import ConfigError
from trainfleet.net.address import Address
from trainfleet.net.tls import Certificates, Identity, pinned_context
from trainfleet.net.token import SECRET_BYTES, Token


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """None at all is for loopback. Off it: a secret with `identity` (who listens) or `fingerprint` (who dials), or
    certificates from files on both sides."""

    secret: bytes | None = field(default=None, repr=False)
    """Both sides prove that they know it, and send no part of it. At least 16 bytes."""
    identity: Identity | None = None
    """Shown by the side that listens."""
    fingerprint: bytes | None = None
    """Of the identity that the side that dials wants to see: SHA-256, 32 bytes."""
    certificates: Certificates | None = None

    def __post_init__(self) -> None:
        if self.secret is not None and len(self.secret) < SECRET_BYTES:
            raise ConfigError(f"The secret has {len(self.secret)} bytes; it needs {SECRET_BYTES}.")
        if self.certificates is not None and (self.identity or self.fingerprint):
            raise ConfigError("Certificates from files and an identity made on the spot: give one of the two.")

    @classmethod
    def make(cls, *, folder: Path | None = None) -> Credentials:
        """For a side that listens: a new secret, and an identity; both kept in `folder`, where one is given."""
        if folder is None:
            return cls(secret=secrets.token_bytes(SECRET_BYTES), identity=Identity.make())
        identity = Identity.kept_in(folder)
        # One file keeps both: who has the key may know the secret, and neither can be lost alone.
        return cls(secret=identity.derive(b"trainfleet secret"), identity=identity)

    @classmethod
    def of(cls, token: Token) -> Credentials:
        """For the side that dials with a token."""
        return cls(secret=token.secret, fingerprint=token.fingerprint)

    def token(self, addresses: Sequence[Address | str] = (), *, via: Token | None = None) -> Token:
        """What the side that listens prints for the others; ConfigError without a secret."""
        if self.secret is None:
            raise ConfigError("A token carries a secret, and these credentials have none.")
        if self.certificates is not None:
            raise ConfigError("Who connects to certificates of a CA needs one too, which a token cannot carry.")
        shown = self.identity.fingerprint if self.identity is not None else None
        return Token.make(addresses, secret=self.secret, fingerprint=shown, via=via)

    @property
    def tls(self) -> bool:
        """Whether the connection is TLS 1.3; otherwise it is plain."""
        return any(part is not None for part in (self.identity, self.fingerprint, self.certificates))

    def server_context(self) -> ssl.SSLContext | None:
        """For the side that listens; None: plain, which only loopback may have (`check_listens`)."""
        if self.certificates is not None:
            return self.certificates.server_context()
        if self.identity is not None:
            return self.identity.server_context()
        if self.fingerprint is not None:
            raise ConfigError("Who listens with a secret needs an identity; a fingerprint is for who dials.")
        return None

    def client_context(self) -> ssl.SSLContext | None:
        """For the side that dials; None: plain, which only loopback may have (`check_dials`)."""
        if self.certificates is not None:
            return self.certificates.client_context()
        if self.expected is not None:
            return pinned_context()
        return None

    @property
    def expected(self) -> bytes | None:
        """The fingerprint that who listens has to show; our own where both sides were given the same identity."""
        if self.fingerprint is not None:
            return self.fingerprint
        return self.identity.fingerprint if self.identity is not None else None

    @property
    def shown(self) -> bytes | None:
        """The fingerprint that who dials sees when we listen; None: no TLS."""
        own = self.certificates or self.identity
        return own.fingerprint if own is not None else None

    def check_listens(self, address: Address, *, loopback: bool) -> None:
        """ConfigError if anyone could connect there, or read along."""
        if loopback or self.certificates is not None or (self.identity is not None and self.secret is not None):
            return
        raise ConfigError(
            f"{address} can be reached from outside, and there are no credentials: anyone could connect.",
            hint="Listen on 127.0.0.1, or with Credentials.make(), whose token goes to the other side.",
        )

    def check_dials(self, address: Address) -> None:
        """ConfigError if what is sent could be read along."""
        if address.is_loopback or self.tls:
            return
        raise ConfigError(
            f"There are no credentials for {address}, which is not this host: anyone could read along.",
            hint="Give the token that the other side prints in place of the address, or certificates.",
        )
