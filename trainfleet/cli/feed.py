"""`trainfleet feed`: make a recipe's batches here, for trainers on other hosts."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trainfleet.cli.standing import credentials_for, ends_by_signal, reached_by, stand, tell_place
from trainfleet.cli.train import make_importable
from trainfleet.cli.way_in import HELP, check_way, opened_way

if TYPE_CHECKING:
    from trainfleet.data.feed.service import DataService
    from trainfleet.net.address import Address
    from trainfleet.net.token import Token
    from trainfleet.training.recipe import Recipe

HERE = "127.0.0.1:7700"


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
    from trainfleet.cli.feed_line import FeedLine
    from trainfleet.config import load_config
    from trainfleet.monitor.units import readable_bytes
    from trainfleet.training.feed import service_of
    from trainfleet.training.recipe import Recipe

    settings = load_config(Recipe, file=recipe, overrides=overrides or []).value
    make_importable(recipe.parent)
    log.setup("debug" if context.obj else "info")
    where = listen or (HERE if tunnel or not (dials or relay) else None)
    check_way(tunnel, certs)
    credentials = credentials_for(where, relay or tunnel, folder, certs)
    service = service_of(
        settings,
        address=where,
        dials=[place for each in dials or [] for place in _places(each, ports)],
        via=relay,
        credentials=credentials,
    )
    ending = ends_by_signal()
    with service, ExitStack() as opened:
        service.open()
        entrance = opened.enter_context(opened_way(tunnel, service, f"trainfleet train {recipe} --feed"))
        if entrance is not None:
            address = [str(entrance.address)]
        _introduce(service, settings, recipe, address or [], dials or [])
        line = FeedLine(service)
        stand(ending, line)
        line()
    served = service.served
    if line.whole:
        print(f"Of the time in which trainers asked: {line.whole}.", flush=True)
    print(f"Ended after {served.batches:,} batches, {readable_bytes(served.num_bytes)}.", flush=True)


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
    tell_place(service, names, dials)
    if service.listener is None:
        return
    print("\nWhere it trains:\n", flush=True)
    print(f"  trainfleet train {path} --feed {reached_by(service, names)}\n", flush=True)
