"""What lies between this host and a listener of trainfleet: step by step, each a finding with its remedy."""

from __future__ import annotations

import math
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from trainfleet.deps import installed
from trainfleet.doctor.finding import Finding
from trainfleet.errors import ConfigError, NotAdmitted, PeerError, TrainfleetError

if TYPE_CHECKING:
    from trainfleet.net.address import Address
    from trainfleet.net.credentials import Credentials
    from trainfleet.net.probe import Probe
    from trainfleet.net.token import Token

CONNECT_SECONDS = 10.0
RATE = timedelta(seconds=1)
"""For each way."""
CLOCKS_AGREE_SECONDS = 1.0
FAR_SECONDS = 0.05
SLOW_BITS_PER_SECOND = 50e6
SOON = timedelta(days=30)
_BATCH_BYTES = 64 * 3 * 224 * 224
"""64 pictures of 224 x 224 pixels as bytes: a batch that people know."""


def check_peer(
    to: str, *, token: str | None = None, certificates: tuple[Path, Path, Path] | None = None
) -> Iterator[Finding]:
    """Name, TCP, TLS, admission, round trip, rates and clocks, until the first that does not work.

    to: an address, or a token. token: itself, or the path of a file that holds it. certificates: CA, certificate, key.
    ConfigError for what is none of these.
    """
    try:
        places, credentials, via = _where(to, token, certificates)
    except NotAdmitted as error:
        yield _wrong("token", error)
        return
    try:
        for place in places:
            steps = list(_reach(place))
            reached = steps[-1].verdict != "no"
            if not reached and place is not places[-1]:
                steps[-1] = replace(steps[-1], verdict="note")  # there are others
            yield from steps
            if reached:
                break
        else:
            return
        yield from _examine_tls(place, credentials, through_relay=via is not None)
        sock = _connect(place, credentials, via)
    except TrainfleetError as error:
        yield _wrong("admission" if isinstance(error, (NotAdmitted, PeerError)) else "credential", error)
        return
    with sock:
        yield from _examine(sock, place, credentials)


def _where(
    to: str, token_text: str | None, certificates: tuple[Path, Path, Path] | None
) -> tuple[list[Address], Credentials, Token | None]:
    """Addresses to try, what to show there, and the relay's token where there is no other way."""
    from trainfleet.net.address import Address
    from trainfleet.net.credentials import Credentials
    from trainfleet.net.tls import Certificates
    from trainfleet.net.token import Token, is_token

    token: Token | None = None
    if token_text is not None:
        text = token_text if is_token(token_text) else _read(Path(token_text))
        token = Token.parse(text)
    places = [] if is_token(to) else [Address.parse(to)]
    if is_token(to):
        token = Token.parse(to)
    if certificates is not None:
        ca, certificate, key = certificates
        return places, Credentials(certificates=Certificates(ca=ca, certificate=certificate, key=key)), None
    if token is None:
        return places, Credentials(), None
    credentials = Credentials.of(token)
    if places or token.addresses:
        return places or list(token.addresses), credentials, None
    assert token.via is not None  # a token names an address or a relay
    return list(token.via.addresses), credentials, token.via


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is no text"
        raise ConfigError(f"--token is neither a token nor a file that holds one: {path}: {reason}.") from exc


def _reach(place: Address) -> Iterator[Finding]:
    """Whether the name resolves, and the port answers."""
    from trainfleet.net.address import obstacle

    begin = time.perf_counter()
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except OSError:
        remedy = "Look for a slip of the pen; ask `getent hosts` on this host, or write the address in numbers."
        fact = f"{place.host} does not resolve: this host does not know that name"
        yield Finding(subject="name", fact=fact, verdict="no", remedy=remedy, exit_code=PeerError.exit_code)
        return
    numbers = list(dict.fromkeys(str(each[4][0]) for each in found))
    yield Finding(subject="name", fact=f"{place.host} is {', '.join(numbers)} ({_since(begin)})")
    begin = time.perf_counter()
    try:
        socket.create_connection((place.host, place.port), timeout=CONNECT_SECONDS).close()
    except OSError as exc:
        yield Finding(
            subject="TCP",
            fact=f"{place} cannot be reached: {obstacle(exc).rstrip('.')}",
            verdict="no",
            remedy="Is it running, with this port, and listening at more than 127.0.0.1? Ask there: trainfleet doctor "
            f"ports {place.port}. Behind a firewall or NAT let that side dial, or use a relay or tunnel: docs/net.md.",
            exit_code=PeerError.exit_code,
        )
        return
    yield Finding(subject="TCP", fact=f"{place} answers ({_since(begin)})")


def _examine_tls(place: Address, credentials: Credentials, *, through_relay: bool) -> Iterator[Finding]:
    """What a connection that is used for nothing else shows of TLS; NotAdmitted and ConfigError as a dial would say."""
    from trainfleet.net.tls import check_fingerprint, pinned_context, refusal

    if through_relay:
        yield Finding(subject="relay", fact=f"{place}: what follows goes through it, encrypted from end to end")
        return
    if not credentials.tls and place.is_loopback:
        yield Finding(subject="TLS", fact="none, which only loopback may do without")
        return
    context = credentials.client_context() or pinned_context()
    try:
        with (
            socket.create_connection((place.host, place.port), timeout=CONNECT_SECONDS) as sock,
            context.wrap_socket(sock, server_hostname=place.host) as secured,
        ):
            yield _shown(secured, credentials)
            if credentials.expected is not None:
                check_fingerprint(secured, credentials.expected, str(place))
    except ssl.SSLError as exc:
        raise refusal(exc, str(place)) or PeerError(f"TLS with {place} fails: {exc.reason or exc}.") from exc
    except TimeoutError as exc:
        raise PeerError(
            f"{place} does not answer TLS in time.", hint="Another program may have that port, or the link is dead."
        ) from exc
    except OSError as exc:
        raise PeerError(
            f"{place} breaks off the handshake of TLS.", hint="Another program may have that port."
        ) from exc
    credentials.check_dials(place)


def _shown(sock: ssl.SSLSocket, credentials: Credentials) -> Finding:
    """Version, cipher, whose certificate it is and until when."""
    from trainfleet.net.tls import peer_fingerprint

    print_ = (peer_fingerprint(sock) or b"").hex()[:16]
    cipher = sock.cipher()
    whose, until = _owner(sock)
    if credentials.certificates is not None:
        trust = f"the certificate of {whose}, which your CA has signed"
    elif credentials.expected is not None:
        trust = "the certificate that the token names"
    else:
        trust = f"a certificate of {whose}, which nothing here vouches for"
    fact = f"{sock.version()}, {cipher[0] if cipher else 'no cipher'}, {trust} ({print_})"
    if until is None:
        return Finding(subject="TLS", fact=fact)
    left = until - datetime.now(timezone.utc)
    if left > SOON:
        return Finding(subject="TLS", fact=f"{fact}, good until {until:%Y-%m-%d}")
    what = f"ends on {until:%Y-%m-%d}" if left > timedelta(0) else f"ended on {until:%Y-%m-%d}"
    return Finding(subject="TLS", fact=f"{fact}; it {what}", verdict="note", remedy="Make a new certificate in time.")


def _owner(sock: ssl.SSLSocket) -> tuple[str, datetime | None]:
    der = sock.getpeercert(binary_form=True)
    if der is None or installed("cryptography") is None:
        return "unknown owner", None
    from cryptography import x509

    certificate = x509.load_der_x509_certificate(der)
    return certificate.subject.rfc4514_string() or "no name", certificate.not_valid_after_utc


def _connect(place: Address, credentials: Credentials, via: Token | None) -> socket.socket:
    from trainfleet.net.dial import connect, connect_through
    from trainfleet.net.probe import ROLE

    ends = time.monotonic() + CONNECT_SECONDS
    if via is not None:
        return connect_through(via, credentials, role=ROLE, admits=None, ends=ends)
    return connect(place, credentials, role=ROLE, admits=None, ends=ends)


def _examine(sock: socket.socket, place: Address, credentials: Credentials) -> Iterator[Finding]:
    """Over an admitted connection."""
    from trainfleet.net.dial import peer_of
    from trainfleet.net.hello import PROTOCOL
    from trainfleet.net.probe import Probe

    peer = peer_of(sock)
    if credentials.certificates is not None:
        how = "by certificates that the same CA has signed"
    elif credentials.secret is not None:
        how = "by the token's secret, which both sides have"
    else:
        how = "without a credential, as on loopback"
    yield Finding(subject="admission", fact=f"as a {peer.role}'s guest, {how}")
    ours = installed("trainfleet") or "unknown"
    same = peer.version == ours
    yield Finding(
        subject="version",
        fact=f"trainfleet {peer.version}, protocol {PROTOCOL}" + ("" if same else f"; this host has {ours}"),
        verdict="ok" if same else "note",
        remedy="" if same else "They understand each other; the same version on both sides is safer.",
    )
    probe = Probe(sock, str(place))
    try:
        yield from _measure(probe)
    except PeerError as error:
        yield _wrong("probe", error)


def _measure(probe: Probe) -> Iterator[Finding]:
    trips = probe.round_trips()
    far = trips.median > FAR_SECONDS
    yield Finding(
        subject="round trip",
        fact=f"{_ms(trips.median)} in the middle, {_ms(trips.fastest)} to {_ms(trips.slowest)}",
        verdict="note" if far else "ok",
        remedy="Far away: keep more batches under way, so that none is waited for." if far else "",
    )
    for subject, measure in (("rate up", probe.bytes_per_second_up), ("rate down", probe.bytes_per_second_down)):
        rate = measure(lasts=RATE)
        slow = rate * 8 < SLOW_BITS_PER_SECOND
        seconds = _BATCH_BYTES / rate if math.isfinite(rate) else 0.0
        yield Finding(
            subject=subject,
            fact=f"{rate / 1e6:,.4g} MB/s ({rate * 8 / 1e6:,.4g} Mbit/s); "
            f"64 pictures of 224 x 224 take {seconds:.3g} s",
            verdict="note" if slow else "ok",
            remedy="Slow: send bytes, not floats; resize before sending; leave jpeg as it is." if slow else "",
        )
    apart = abs(trips.clock_ahead)
    doubt = trips.fastest / 2
    wrong = apart - doubt > CLOCKS_AGREE_SECONDS
    where = "ahead of" if trips.clock_ahead > 0 else "behind"
    yield Finding(
        subject="clocks",
        fact=f"theirs is {_ms(apart)} {where} ours, give or take {_ms(doubt)}",
        verdict="note" if wrong else "ok",
        remedy="Times in logs do not match, and certificates may seem not yet valid: run NTP." if wrong else "",
    )


def _wrong(subject: str, error: TrainfleetError) -> Finding:
    remedy = error.hint or ""
    return Finding(subject=subject, fact=str(error).rstrip("."), verdict="no", remedy=remedy, exit_code=error.exit_code)


def _since(begin: float) -> str:
    return _ms(time.perf_counter() - begin)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
