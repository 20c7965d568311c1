"""`trainfleet relay`: a meeting point for two sides that nobody can dial."""

from __future__ import annotations

import signal
import threading
from datetime import timedelta
from pathlib import Path

import typer


def relay(
    port: int = typer.Option(7701, "--port", help="To listen at; 0 takes a free one.", min=0, max=65535),
    host: str = typer.Option("0.0.0.0", "--host", help="Interface to listen at; 0.0.0.0 is all, 127.0.0.1 none."),
    address: list[str] | None = typer.Option(
        None,
        "--address",
        help="How others call this host; may be given again.  [default: its number]",
        metavar="HOST[:PORT]",
    ),
    folder: Path | None = typer.Option(
        None, "--folder", help="Keeps the identity, so that the token outlives a restart.", metavar="FOLDER"
    ),
    rooms: int = typer.Option(256, "--rooms", help="Tokens of others with someone waiting.", min=1),
    parked: int = typer.Option(32, "--parked", help="Connections that wait in one room.", min=1),
    pairs: int = typer.Option(512, "--pairs", help="Joined connections, two threads each.", min=1),
    idle: float = typer.Option(3600.0, "--idle", help="Seconds without a byte after which a pair ends.", min=1.0),
    rate: float | None = typer.Option(
        None, "--megabytes-per-second", help="Of a pair, each way.  [default: no limit]", min=0.001
    ),
) -> None:
    """Join two sides behind routers: both dial here.

    What they say stays private to them. Prints a token for the side that listens; that side's own token then brings
    the other one here.
    """
    from trainfleet.net.address import Address
    from trainfleet.net.credentials import Credentials
    from trainfleet.net.relay import Limits, Relay

    limits = Limits(
        rooms=rooms,
        parked=parked,
        pairs=pairs,
        idle=timedelta(seconds=idle),
        bytes_per_second=rate * 1e6 if rate is not None else None,
    )
    ending = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ending.set())
    with Relay(Address(host, port), credentials=Credentials.make(folder=folder), limits=limits) as running:
        print(f"Relaying at {running.address}. The side that listens needs this token:", flush=True)
        names = [Address.parse(name, port=running.address.port) for name in address or ()]
        print(running.token(names), flush=True)
        while not ending.wait(3600):
            pass
        waiting, joined = running.counts()
        print(f"Ended with {joined} joined connections and {waiting} that waited.", flush=True)
