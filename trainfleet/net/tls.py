"""TLS 1.3: an identity made on the spot and known by its fingerprint, or certificates from files on both sides."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import socket
import ssl
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

from trainfleet.deps import require
from trainfleet.errors import ConfigError, NotAdmitted
from trainfleet.net.sockets import close_gently, set_remaining

_YEARS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A self-signed certificate and its key (EC P-256). Who knows the fingerprint knows the owner, whatever CAs say."""

    certificate: bytes
    """PEM."""
    key: bytes = field(repr=False)
    """PEM, PKCS 8, not encrypted."""

    @classmethod
    def make(cls) -> Identity:
        """A new one, in memory; DependencyError without the extra `net`."""
        require("cryptography", "net", purpose="TLS off loopback")
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "trainfleet")])
        now = datetime.now(timezone.utc)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))  # clocks may differ
            .not_valid_after(now + timedelta(days=365 * _YEARS))
            .sign(key, hashes.SHA256())
        )
        return cls(
            certificate=certificate.public_bytes(serialization.Encoding.PEM),
            key=key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )

    @classmethod
    def kept_in(cls, folder: Path) -> Identity:
        """The one of that folder, made there (0600) if there is none, so that tokens outlive a restart."""
        path = folder / "identity.pem"
        try:
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                made = cls.make()
                _write_once(path, made.key + made.certificate)
            text = path.read_bytes()
            if os.name == "posix" and path.stat().st_mode & 0o077:
                raise ConfigError(
                    f"{path} holds a private key that others of this host may read.", hint=f"chmod 600 {path}"
                )
        except OSError as exc:
            raise ConfigError(f"The identity {path} cannot be kept: {exc.strerror}.") from exc
        key, begin, certificate = text.partition(b"-----BEGIN CERTIFICATE-----")
        identity = cls(certificate=begin + certificate, key=key)
        try:
            identity.server_context()
        except (ssl.SSLError, ValueError) as exc:
            raise ConfigError(
                f"{path} holds no key and certificate that belong together.", hint="Remove it; a new one will be made."
            ) from exc
        return identity

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate, 32 bytes."""
        return fingerprint(ssl.PEM_cert_to_DER_cert(self.certificate.decode("ascii")))

    def derive(self, purpose: bytes) -> bytes:
        """16 secret bytes that only who has the key can know, the same for the same purpose."""
        return hmac.digest(self.key, purpose, "sha256")[:16]

    def server_context(self) -> ssl.SSLContext:
        context = _context(ssl.PROTOCOL_TLS_SERVER)
        with _as_file(self.key + self.certificate) as path:
            context.load_cert_chain(path)
        return context


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificates:
    """PEM files: each side shows `certificate` and wants one of the other that `ca` has signed."""

    ca: Path
    certificate: Path
    key: Path

    def server_context(self) -> ssl.SSLContext:
        return self._load(_context(ssl.PROTOCOL_TLS_SERVER))

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of our certificate (the first of the file), 32 bytes."""
        _, begin, rest = self.certificate.read_text("ascii").partition("-----BEGIN CERTIFICATE-----")
        body, end, _ = rest.partition("-----END CERTIFICATE-----")
        return fingerprint(ssl.PEM_cert_to_DER_cert(begin + body + end))

    def client_context(self) -> ssl.SSLContext:
        """Also wants the certificate to be of the host that was dialled."""
        return self._load(_context(ssl.PROTOCOL_TLS_CLIENT))

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        for path in (self.ca, self.certificate, self.key):
            if not path.is_file():
                raise ConfigError(f"There is no file {path}. TLS needs the CA, the certificate and its key, as PEM.")
        try:
            context.load_verify_locations(self.ca)
            # An empty password, not a question on the terminal, where the key is encrypted.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (ssl.SSLError, OSError, ValueError) as exc:
            raise ConfigError(
                f"{self.certificate}, {self.key} and {self.ca} cannot be used for TLS: {_reason(exc)}.",
                hint="All are PEM; the key is that of the certificate, and is not encrypted.",
            ) from exc
        context.verify_mode = ssl.CERT_REQUIRED
        return context


def pinned_context() -> ssl.SSLContext:
    """For a dialler who compares the fingerprint itself (`check_fingerprint`); no CA is asked."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        # Connections are long and few: tickets would only be bytes that come after the handshake.
        context.num_tickets = 0
    return context


def start_tls(context: ssl.SSLContext, sock: socket.socket, *, name: str | None, ends: float) -> ssl.SSLSocket:
    """`sock` after the handshake, until `ends`; for who dials `name`, for who listens None. Closed where it fails."""
    try:
        secured = context.wrap_socket(
            sock, server_side=name is None, server_hostname=name, do_handshake_on_connect=False
        )
    except OSError as exc:
        # Of a connection that was reset already, the half-made SSLSocket has taken the descriptor over and is to be
        # found in the traceback only (3.11): it would stay open for as long as anyone keeps the exception.
        traceback.clear_frames(exc.__traceback__)
        raise
    try:
        set_remaining(secured, ends)
        secured.do_handshake()
    except BaseException:
        if name is None:
            close_gently(secured)  # so that the alert arrives which says why
        secured.close()
        raise
    return secured


def fingerprint(der: bytes) -> bytes:
    """SHA-256 of a certificate in DER, 32 bytes."""
    return hashlib.sha256(der).digest()


def peer_fingerprint(sock: ssl.SSLSocket) -> bytes | None:
    """Of the certificate that the other side showed; None where it showed none."""
    der = sock.getpeercert(binary_form=True)
    return fingerprint(der) if der else None


def check_fingerprint(sock: ssl.SSLSocket, expected: bytes, address: str) -> None:
    """NotAdmitted if the other side is not the one whose fingerprint we have."""
    shown = peer_fingerprint(sock) or b""
    if shown != expected:  # neither is secret
        raise NotAdmitted(
            f"What listens at {address} has the certificate {shown.hex()[:16]}, but the token says "
            f"{expected.hex()[:16]}.",
            hint="It was started anew with another identity, or is another program: take the token that it prints now.",
        )


_NOT_TLS = (
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
    "HTTP_REQUEST",
    "UNKNOWN_PROTOCOL",
)


def refusal(exc: ssl.SSLError, address: str) -> NotAdmitted | None:
    """What an error of TLS says about credentials; None where it is only a connection that broke."""
    reason = getattr(exc, "reason", None) or ""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return NotAdmitted(
            f"The certificate of {address} does not hold: {exc.verify_message}.",
            hint="It has to be signed by the CA you gave, for that name, and be within its dates.",
        )
    if reason in _NOT_TLS:
        return NotAdmitted(
            f"What is at {address} does not speak TLS.",
            hint="Another program may have the port, or it was started without credentials.",
        )
    if "PROTOCOL_VERSION" in reason or "UNSUPPORTED_PROTOCOL" in reason or "NO_PROTOCOLS" in reason:
        return NotAdmitted(f"What is at {address} speaks an older TLS than 1.3, which is the least we take.")
    # Other alerts say that bytes were not those that were sent: that a link was bad, and another try may do.
    if any(word in reason for word in ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "HANDSHAKE_FAILURE")):
        return NotAdmitted(
            f"What is at {address} refuses our certificate: {_reason(exc)}.",
            hint="It wants one that its CA has signed and that is within its dates.",
        )
    return None


def _reason(exc: Exception) -> str:
    reason = getattr(exc, "reason", None) or getattr(exc, "strerror", None) or str(exc)
    return str(reason).replace("_", " ").lower().rstrip(".")


def _write_once(path: Path, text: bytes) -> None:
    """Write a private file that is there wholly or not at all; whoever came first is kept."""
    fd, name = tempfile.mkstemp(dir=path.parent)  # 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(text)
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        Path(name).unlink()


@contextlib.contextmanager
def _as_file(text: bytes) -> Iterator[str]:
    """A path to read `text` from, since ssl takes keys from files only; in memory where the system can."""
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
        fd = os.memfd_create("identity")
        try:
            os.write(fd, text)
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)
    else:
        with tempfile.TemporaryDirectory() as folder:  # 0700
            path = Path(folder) / "identity.pem"
            path.write_bytes(text)
            yield str(path)
