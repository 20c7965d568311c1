"""`trainfleet feed`: make a recipe's batches here, for trainers on other hosts."""

from __future__ import annotations

import io
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

from trainfleet.cli.train import make_importable
from trainfleet.cli.way_in import HELP, check_way, opened_way

if TYPE_CHECKING:
    from trainfleet.data.feed.service import DataService
    from trainfleet.net.address import Address
    from trainfleet.net.credentials import Credentials
    from trainfleet.net.token import Token
    from trainfleet.training.recipe import Recipe

HERE = "127.0.0.1:7700"
_REFRESH_SECONDS = 0.5
_CLEAR = "\r\033[K"


def feed(
    context: typer.Context,
    recipe: Path = typer.Argument(..., help="A YAML file.", metavar="RECIPE", show_default=False),
    overrides: list[str] | None = typer.Argument(
        None, help="Values that beat all others, such as data.workers=8.", metavar="[SECTION.KEY=VALUE]..."
    ),
    listen: str | None = typer.Option(
        None, "--listen", help=f"Where trainers connect to; 0.0.0.0 is all of this host.  [default: {HERE}]"
    ),
    address: list[str] | None = typer.Option(
        None, "--address", help="How others call this host; may be given again.  [default: its name]", metavar="HOST"
    ),
    dials: list[str] | None = typer.Option(
        None, "--dial", help="A trainer that listens; may be given again.", metavar="HOST:PORT|TOKEN"
    ),
    ports: int = typer.Option(1, "--ports", help="With --dial: how many ports to call, from that one on.", min=1),
    relay: str | None = typer.Option(None, "--relay", help="Where trainers come to.", metavar="TOKEN"),
    tunnel: str | None = typer.Option(
        None,
        "--tunnel",
        help=HELP,
        metavar="WAY",
    ),
    folder: Path | None = typer.Option(
        None, "--folder", help="Keeps the identity, so that the token outlives a restart.", metavar="FOLDER"
    ),
    certs: Path | None = typer.Option(
        None, "--certs", help="ca.pem, certificate.pem and key.pem, in place of a token.", metavar="FOLDER"
    ),
) -> None:
    """Make the batches of a recipe, for trainers on other hosts.

    They run `trainfleet train RECIPE --feed HOST:PORT|TOKEN`. Ends at Ctrl-C; trainers wait for it to come back, or
    are fed by others.
    """
    from trainfleet import log
    from trainfleet.config import load_config
    from trainfleet.training.feed import service_of
    from trainfleet.training.recipe import Recipe

    settings = load_config(Recipe, file=recipe, overrides=overrides or []).value
    make_importable(recipe.parent)
    log.setup("debug" if context.obj else "info")
    where = listen or (HERE if tunnel or not (dials or relay) else None)
    check_way(tunnel, certs)
    credentials = _credentials(where, relay or tunnel, folder, certs)
    service = service_of(
        settings,
        address=where,
        dials=[place for each in dials or [] for place in _places(each, ports)],
        via=relay,
        credentials=credentials,
    )
    ending = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ending.set())
    with service, ExitStack() as opened:
        service.open()
        entrance = opened.enter_context(opened_way(tunnel, service, f"trainfleet train {recipe} --feed"))
        if entrance is not None:
            address = [str(entrance.address)]
        _introduce(service, settings, recipe, address or [], dials or [])
        with _LiveLine(service) as line:
            while not ending.wait(_REFRESH_SECONDS if line.is_shown else 3600):
                line.refresh()
    served = service.served
    print(f"Ended after {served.batches:,} batches, {_bytes(served.num_bytes)}.", flush=True)


def _credentials(where: str | None, relay: str | None, folder: Path | None, certs: Path | None) -> Credentials | None:
    """Those of files; none where only this host can connect; otherwise new ones, or those kept in `folder`."""
    from trainfleet.net.address import Address
    from trainfleet.net.credentials import Credentials

    if certs is not None:
        from trainfleet.data.feed.config import certificates_in

        return Credentials(certificates=certificates_in(certs))
    if relay is None and folder is None and (where is None or Address.parse(where).is_loopback):
        return None
    return Credentials.make(folder=folder)


def _places(to: str, ports: int) -> list[Address | Token]:
    """Whom to call: an address or token, and the ports after it."""
    from trainfleet.net.address import Address
    from trainfleet.net.token import Token, is_token

    def later(address: Address, step: int) -> Address:
        return replace(address, port=address.port + step)

    if not is_token(to):
        return [later(Address.parse(to), step) for step in range(ports)]
    token = Token.parse(to)
    return [replace(token, addresses=tuple(later(each, step) for each in token.addresses)) for step in range(ports)]


def _introduce(service: DataService, recipe: Recipe, path: Path, names: list[str], dials: list[str]) -> None:
    """What is served, and what to do on the other side."""
    for name, offer in service.offers.items():
        print(f"{name:<11} {offer.samples:,} samples of {offer.source}", flush=True)
    workers = recipe.data.workers
    print(f"{'made by':<11} {f'{workers} workers' if workers > 1 else '1 process'}", flush=True)
    for to in dials:
        print(f"{'calls':<11} {to if len(to) < 60 else to[:12] + '…'}", flush=True)
    if service.listener is None:
        return
    print(f"{'listens at':<11} {service.listener.address}", flush=True)
    if names:
        print(f"{'called':<11} {', '.join(names)}", flush=True)
    if service.credentials.secret is None and service.listener.address.is_loopback:
        print(f"{'':<11} only this host can connect; --listen 0.0.0.0 lets others, by a token", flush=True)
    print("\nWhere it trains:\n", flush=True)
    print(f"  trainfleet train {path} --feed {_for_trainers(service, names)}\n", flush=True)


def _for_trainers(service: DataService, names: list[str]) -> str:
    """The token; the address where there is none to be had."""
    from trainfleet.net.address import Address

    assert service.listener is not None
    place, credentials = service.listener.address, service.credentials
    anywhere = place.host in ("0.0.0.0", "::")
    called = names or ([socket.gethostname()] if anywhere else [])
    places = [Address.parse(name, port=place.port) for name in called] or [place]
    if credentials.secret is None:
        return " --feed ".join(str(each) for each in places)
    return str(service.listener.token(places if called else ()))


class _LiveLine:
    """Batches and bytes a second, trainers and what waits, on one line; in a terminal only."""

    def __init__(self, service: DataService) -> None:
        self._service = service
        self._terminal = sys.stderr
        self.is_shown = self._terminal.isatty()
        self._last, self._at = service.served, time.monotonic()

    def refresh(self) -> None:
        if not self.is_shown:
            return
        served, now = self._service.served, time.monotonic()
        seconds = max(now - self._at, 1e-9)
        rate = (served.batches - self._last.batches) / seconds
        speed = (served.num_bytes - self._last.num_bytes) / seconds
        self._last, self._at = served, now
        connections = f"{served.trainers} connection{'s' * (served.trainers != 1)}"
        self._write(
            f"{rate:,.1f} batches/s  {_bytes(speed)}/s  {connections}  {served.waiting} waiting  "
            f"{served.batches:,} batches"
        )

    def _write(self, text: str) -> None:
        print(f"{_CLEAR}{text}", end="", file=self._terminal, flush=True)

    def __enter__(self) -> _LiveLine:
        if self.is_shown:
            sys.stderr = _Above(self._terminal)
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_shown:
            sys.stderr = self._terminal
            self._write("")


class _Above(io.TextIOBase):
    """Stands in for stderr: what is logged takes the place of the live line, which comes back below."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal

    def write(self, text: str) -> int:
        return self._terminal.write(f"{_CLEAR}{text}")

    def flush(self) -> None:
        self._terminal.flush()


def _bytes(count: float) -> str:
    from trainfleet.monitor.units import readable_bytes

    return readable_bytes(count)
