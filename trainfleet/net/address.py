"""Where something listens: host and port, and what stands in the way, in words."""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass

from trainfleet.errors import ConfigError

DEFAULT_PORT = 7700
_ALL = ("0.0.0.0", "::")
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))  # RFC 5737 and 3849: nobody's


@dataclass(frozen=True, slots=True)
class Address:
    """A host by name or number, and a port of it."""

    host: str
    port: int = DEFAULT_PORT
    """0, for those who listen: any that is free."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"The port of {self.host} is {self.port}; ports go from 1 to 65535.")
        # 253 is the longest name of the domain name system; what is not printable ASCII is punycode there.
        if not 0 < len(self.host) <= 253 or not self.host.isascii() or not self.host.isprintable():
            raise ConfigError(f"{self.host[:60]!r} is not the name or number of a host.")
        if any(sign in self.host for sign in " /@[]"):
            raise ConfigError(f"{self.host!r} is not a host. Write host:port, such as cpu-0:{DEFAULT_PORT}.")

    @classmethod
    def parse(cls, text: str | Address, *, port: int = DEFAULT_PORT) -> Address:
        """`cpu-0:7700`, `10.0.0.7` (and `port`), `[::1]:7700` or `::1`; ConfigError for what is none of these."""
        if isinstance(text, Address):
            return text
        host, colon, digits = text.strip(), "", ""
        if host.startswith("["):
            host, bracket, rest = host[1:].partition("]")
            colon, digits = rest[:1], rest[1:]
            if not bracket or (rest and colon != ":") or not _is_ipv6(host):
                raise ConfigError(f"{text!r} is no address; in brackets belongs one of IPv6, as in [::1]:7700.")
        elif not _is_ipv6(host):
            host, colon, digits = host.partition(":")
        if not host:
            raise ConfigError(f"{text!r} names no host. 0.0.0.0:{digits or port} listens on all interfaces.")
        if colon and not (digits.isascii() and digits.isdigit() and len(digits) <= 5):
            raise ConfigError(f"The port of {text!r} is {digits!r}; write host:port, such as {host}:{port}.")
        return cls(host, int(digits) if colon else port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether it means the host itself to everyone who uses it. A name that only resolves to it does not count."""
        return self.host == "localhost" or is_loopback_number(self.host)

    def seen_by_others(self) -> list[Address]:
        """What others may dial where this host listens at it: itself, or for all interfaces those that lead outward."""
        if self.host not in _ALL:
            return [self]
        found = [Address(number, self.port) for number in map(_number_towards, _ELSEWHERE) if number is not None]
        return found or [Address("127.0.0.1", self.port)]

    def resolve(self) -> tuple[socket.AddressFamily, tuple[str, int]]:
        """Family and numbers to listen at; ConfigError where this host does not know the name."""
        try:
            family, _, _, _, place = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except OSError as exc:
            raise ConfigError(
                f"This host does not know the name {self.host}, so nothing can listen there.",
                hint="Give a number or name of this host; 0.0.0.0 stands for all its interfaces.",
            ) from exc
        return family, (str(place[0]), int(place[1]))


def _number_towards(place: tuple[socket.AddressFamily, str]) -> str | None:
    """Our address on the way to another host; None where there is no way."""
    family, host = place
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # a datagram socket sends nothing here
            return str(probe.getsockname()[0])
    except OSError:
        return None


def is_loopback_number(host: str) -> bool:
    """Whether a numeric address is in 127.0.0.0/8 or ::1."""
    try:
        number = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(number, "ipv4_mapped", None)
    return bool((mapped or number).is_loopback)


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def obstacle(exc: OSError) -> str:
    """Why something could not be reached, as the end of a sentence."""
    if isinstance(exc, socket.gaierror):
        return "this host does not know that name."
    if isinstance(exc, ConnectionRefusedError):
        return "the port is closed; nothing listens there, or a firewall refuses."
    if isinstance(exc, TimeoutError):
        return "no answer; the host is down, or a firewall swallows the packets."
    if isinstance(exc, ConnectionError):
        return "it closed the connection."
    if exc.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return "no way leads there from this host."
    return f"{exc.strerror or exc}."
