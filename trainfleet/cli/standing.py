"""A side that stands and serves: its credentials, how others reach it, and how it goes until a signal."""

from __future__ import annotations

import io
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from trainfleet.net.credentials import Credentials
    from trainfleet.net.service import Service

_REFRESH_SECONDS = 0.5
_PLAIN_SECONDS = 15.0
_CLEAR = "\r\033[K"


def credentials_for(
    where: str | None, relay: str | None, folder: Path | None, certs: Path | None
) -> Credentials | None:
    """Those of files; none where only this host can connect; otherwise new ones, or those kept in `folder`."""
    from trainfleet.net.address import Address
    from trainfleet.net.credentials import Credentials

    if certs is not None:
        from trainfleet.data.feed.config import certificates_in

        return Credentials(certificates=certificates_in(certs))
    if relay is None and folder is None and (where is None or Address.parse(where).is_loopback):
        return None
    return Credentials.make(folder=folder)


def tell_place(service: Service[Any], names: Sequence[str], dials: Sequence[str]) -> None:
    """Whom it calls and where it listens, in lines."""
    for to in dials:
        print(f"{'calls':<11} {to if len(to) < 60 else to[:12] + '…'}", flush=True)
    if service.listener is None:
        return
    print(f"{'listens at':<11} {service.listener.address}", flush=True)
    if names:
        print(f"{'called':<11} {', '.join(names)}", flush=True)
    if service.credentials.secret is None and service.listener.address.is_loopback:
        print(f"{'':<11} only this host can connect; --listen 0.0.0.0 lets others, by a token", flush=True)


def reached_by(service: Service[Any], names: Sequence[str]) -> str:
    """What follows --feed on the other side: the token; the address where there is none to be had."""
    from trainfleet.net.address import Address

    assert service.listener is not None
    place, credentials = service.listener.address, service.credentials
    anywhere = place.host in ("0.0.0.0", "::")
    called = names or ([socket.gethostname()] if anywhere else [])
    places = [Address.parse(name, port=place.port) for name in called] or [place]
    if credentials.secret is None:
        return " --feed ".join(str(each) for each in places)
    return str(service.listener.token(places if called else ()))


def ends_by_signal() -> threading.Event:
    """Set by Ctrl-C and by SIGTERM from now on."""
    ending = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ending.set())
    return ending


def stand(ending: threading.Event, text: Callable[[float], str]) -> None:
    """Wait for `ending`, and show `text` of the seconds since it was last asked."""
    with LiveLine(text) as line:
        while not ending.wait(_REFRESH_SECONDS):
            line.refresh()


class LiveLine:
    """One line at the bottom of a terminal that says how it goes; elsewhere a line of its own each 15 seconds."""

    def __init__(self, text: Callable[[float], str]) -> None:
        self._text = text
        self._terminal = sys.stderr
        self.is_shown = self._terminal.isatty()
        self._at = self._printed_at = time.monotonic()
        self._printed = ""

    def refresh(self) -> None:
        now = time.monotonic()
        seconds, self._at = max(now - self._at, 1e-9), now
        text = self._text(seconds)
        if self.is_shown:
            self._write(text[: shutil.get_terminal_size().columns - 1])
        elif now - self._printed_at >= _PLAIN_SECONDS and text != self._printed:
            self._printed_at, self._printed = now, text
            print(text, flush=True)

    def _write(self, text: str) -> None:
        print(f"{_CLEAR}{text}", end="", file=self._terminal, flush=True)

    def __enter__(self) -> LiveLine:
        if self.is_shown:
            sys.stderr = Above(self._terminal)
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_shown:
            sys.stderr = self._terminal
            self._write("")


class Above(io.TextIOBase):
    """Stands in for stderr: what is logged takes the place of the live line, which comes back below."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal

    def write(self, text: str) -> int:
        return self._terminal.write(f"{_CLEAR}{text}")

    def flush(self) -> None:
        self._terminal.flush()
