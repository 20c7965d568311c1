"""A tunnel that is kept open: opened again when its program ends, at the same address where that can be had."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from trainfleet.errors import ConfigError, TrainfleetError
from trainfleet.net.address import Address
from trainfleet.net.retry import pauses
from trainfleet.net.tunnel import Tunnel, open_tunnel

logger = logging.getLogger(__name__)

FORMS = "ssh:USER@HOST[:PORT], ssh-at:USER@HOST[:PORT], ngrok or cloudflared"
_LOOK_SECONDS = 0.5
_SAME_PORT_TRIES = 8
"""The far end of a lost ssh may hold its port for a while; then another is taken."""


@dataclass(frozen=True, slots=True)
class Way:
    """Which tunnel to open, as a person writes it."""

    kind: str
    host: str | None = None
    ssh_port: int | None = None
    at_host: bool = False
    """The other side runs on the very host that ssh goes to."""

    @classmethod
    def parse(cls, text: str) -> Way:
        """`ngrok`, `cloudflared`, `ssh:me@example.org`, `ssh:me@example.org:2222`; `ssh-at:` where the other side runs
        on that host. PORT is the one of its ssh. ConfigError for what is none of these."""
        kind, colon, place = text.strip().partition(":")
        if kind in ("ngrok", "cloudflared") and not colon:
            return cls(kind)
        if kind not in ("ssh", "ssh-at") or not place or place.startswith("-"):
            raise ConfigError(f"{text!r} is no tunnel.", hint=f"Write {FORMS}.")
        user, at, where = place.rpartition("@")
        address = Address.parse(where, port=0)
        return cls("ssh", f"{user}{at}{address.host}", address.port or None, kind == "ssh-at")

    def __str__(self) -> str:
        return self.kind if self.host is None else f"ssh to {self.host}"


class Entrance:
    """A way in to `port` of our loopback, open from its construction until `close`.

    moved: told where it opened anew, if that is elsewhere than before: those outside need another token then.
    Raises what `open_tunnel` raises where the first does not open; later failures are said in the log and waited out.
    """

    def __init__(self, way: Way | str, port: int, *, moved: Callable[[Address], None] | None = None) -> None:
        self._way = Way.parse(way) if isinstance(way, str) else way
        self._port, self._moved = port, moved
        self._closing = threading.Event()
        self._tunnel = self._open(far_port=0)
        self.address = self._tunnel.address
        """What the other side dials."""
        self._thread = threading.Thread(target=self._keep, name=f"trainfleet-tunnel-{self._way.kind}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """May be called twice."""
        self._closing.set()
        self._thread.join()
        self._tunnel.close()

    def __enter__(self) -> Entrance:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, *, far_port: int) -> Tunnel:
        way = self._way
        options = ["-p", str(way.ssh_port)] if way.ssh_port is not None else []
        return open_tunnel(
            way.kind,
            self._port,
            host=way.host,
            far_port=far_port,
            at_host=way.at_host,
            ssh_options=options,
            timeout=timedelta(seconds=30),
        )

    def _keep(self) -> None:
        while not self._closing.wait(_LOOK_SECONDS):
            if not self._tunnel.is_open:
                self._tunnel.close()
                self._open_again()

    def _open_again(self) -> None:
        said = False
        for tries, pause in enumerate(pauses(first=0.5, most=30.0)):
            if self._closing.wait(pause):
                return
            same = self._way.kind == "ssh" and tries < _SAME_PORT_TRIES
            try:
                self._tunnel = self._open(far_port=self.address.port if same else 0)
                break
            except TrainfleetError as exc:
                if not said:
                    logger.warning("The tunnel by %s is not open yet, and is tried again: %s", self._way, exc)
                said = True
        before, self.address = self.address, self._tunnel.address
        if self.address == before:
            logger.info("The tunnel by %s is open again at %s: the token is as before.", self._way, before)
            return
        logger.warning("The tunnel by %s is open again, at %s in place of %s.", self._way, self.address, before)
        if self._moved is not None:
            self._moved(self.address)
