"""`--tunnel`: a way in to a side that listens where others cannot reach it, and the line to run there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from trainfleet.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from trainfleet.net.address import Address
    from trainfleet.net.entrance import Entrance
    from trainfleet.net.service import Service

HELP = "A way in where this host cannot be reached: ssh:ME@HOST[:PORT], ngrok, cloudflared (docs/net.md)."


def check_way(tunnel: str | None, certs: Path | None = None) -> None:
    """ConfigError for what is no tunnel, before anything is opened."""
    from trainfleet.net.entrance import Way

    if tunnel is not None:
        Way.parse(tunnel)
        if certs is not None:
            raise ConfigError("--tunnel leads here by a token, and --certs gives none. Leave one of them out.")


def opened_way(tunnel: str | None, service: Service[Any], line: str) -> AbstractContextManager[Entrance | None]:
    """The way in, if there is to be one. If it has to move, `line` is printed again, with its new token."""
    if tunnel is None:
        return nullcontext()
    from trainfleet.net.entrance import Entrance

    def moved(address: Address) -> None:
        print(f"\nThe tunnel has another address now:\n\n  {line} {service.token([address])}\n", flush=True)

    return Entrance(tunnel, service.address.port, moved=moved)
