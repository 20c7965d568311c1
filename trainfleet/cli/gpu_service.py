"""`trainfleet gpu-service`: a recipe's trained model stands here, and answers for batches of other hosts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trainfleet.cli.standing import credentials_for, ends_by_signal, reached_by, stand, tell_place
from trainfleet.cli.train import make_importable
from trainfleet.cli.way_in import HELP, check_way, opened_way

if TYPE_CHECKING:
    from trainfleet.serve.predictor import Predictor
    from trainfleet.serve.service import ModelService

HERE = "127.0.0.1:7800"


def gpu_service(
    context: typer.Context,
    recipe: Path = typer.Argument(..., help="A YAML file.", metavar="RECIPE", show_default=False),
    overrides: list[str] | None = typer.Argument(
        None, help="Values that beat all others, such as loss=mse.", metavar="[SECTION.KEY=VALUE]..."
    ),
    weights: str | None = typer.Option(
        None,
        "--weights",
        help="A run, a checkpoint, or a file that others saved.  [default: the newest checkpoint of the recipe's run]",
        metavar="PLACE",
    ),
    device: str | None = typer.Option(None, "--device", help="Where to compute.  [default: cuda if there is one]"),
    listen: str | None = typer.Option(
        None, "--listen", help=f"Where clients connect to; 0.0.0.0 is all of this host.  [default: {HERE}]"
    ),
    address: list[str] | None = typer.Option(
        None, "--address", help="How others call this host; may be given again.  [default: its name]", metavar="HOST"
    ),
    dials: list[str] | None = typer.Option(
        None, "--dial", help="A client that listens; may be given again.", metavar="HOST:PORT|TOKEN"
    ),
    relay: str | None = typer.Option(None, "--relay", help="Where clients come to.", metavar="TOKEN"),
    tunnel: str | None = typer.Option(None, "--tunnel", help=HELP, metavar="WAY"),
    folder: Path | None = typer.Option(
        None, "--folder", help="Keeps the identity, so that the token outlives a restart.", metavar="FOLDER"
    ),
    certs: Path | None = typer.Option(
        None, "--certs", help="ca.pem, certificate.pem and key.pem, in place of a token.", metavar="FOLDER"
    ),
    classes: list[str] | None = typer.Option(
        None, "--class", help="A dataclass or named tuple that batches are made of.", metavar="PACKAGE.MODULE:NAME"
    ),
) -> None:
    """Answer `validate` and `predict` of other hosts with a trained model.

    They run `trainfleet validate RECIPE --feed HOST:PORT|TOKEN`, or predict. Ends at Ctrl-C; clients wait for it to
    come back, or ask others.
    """
    from trainfleet import log
    from trainfleet.config import load_config
    from trainfleet.imports import load_object
    from trainfleet.serve.service import ModelService
    from trainfleet.training.inference import predictor_of
    from trainfleet.training.recipe import Recipe

    settings = load_config(Recipe, file=recipe, overrides=overrides or []).value
    make_importable(recipe.parent)
    log.setup("debug" if context.obj else "info")
    where = listen or (HERE if tunnel or not (dials or relay) else None)
    check_way(tunnel, certs)
    credentials = credentials_for(where, relay or tunnel, folder, certs)
    predictor = predictor_of(settings, weights, device)
    service = ModelService(
        predictor,
        address=where,
        dials=dials or [],
        via=relay,
        credentials=credentials,
        classes=[load_object(path, key="--class") for path in classes or []],
    )
    ending = ends_by_signal()
    with service, ExitStack() as opened:
        service.open()
        entrance = opened.enter_context(opened_way(tunnel, service, f"trainfleet validate {recipe} --feed"))
        if entrance is not None:
            address = [str(entrance.address)]
        tell_model(predictor, service)
        tell_place(service, address or [], dials or [])
        if service.listener is not None:
            tell_clients(recipe, reached_by(service, address or []))
        stand(ending, how_it_goes(service))
    print(f"Ended after {service.served.batches:,} batches, {service.served.rows:,} rows.", flush=True)


def tell_model(predictor: Predictor, service: ModelService) -> None:
    """What answers here."""
    parameters = sum(parameter.numel() for parameter in predictor.model.parameters())
    print(f"{'model':<11} {service.offer.model}, {parameters:,} parameters", flush=True)
    print(f"{'weights':<11} {service.offer.digest}", flush=True)
    print(f"{'device':<11} {_name_of(service.offer.device)}", flush=True)


def _name_of(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return f"{device}, {torch.cuda.get_device_name(device)}"


def tell_clients(recipe: Path, place: str) -> None:
    """The two lines for the other side."""
    print("\nWhere the data are:\n", flush=True)
    print(f"  trainfleet validate {recipe} --feed {place}", flush=True)
    print(f"  trainfleet predict {recipe} --feed {place} --to predictions\n", flush=True)


def how_it_goes(service: ModelService) -> Callable[[float], str]:
    """Batches, rows and bytes a second, how busy the device is, clients and what waits."""
    from trainfleet.monitor.units import readable_bytes

    last = service.served

    def text(seconds: float) -> str:
        nonlocal last
        now, before = service.served, last
        last = now
        busy = min(1.0, (now.busy_seconds - before.busy_seconds) / seconds)
        failed = f"  {now.failed:,} failed" if now.failed else ""
        return (
            f"{(now.batches - before.batches) / seconds:,.1f} batches/s  "
            f"{(now.rows - before.rows) / seconds:,.0f} rows/s  "
            f"{readable_bytes((now.num_bytes - before.num_bytes) / seconds)}/s  model {busy:.0%} busy  "
            f"{now.clients} client{'s' * (now.clients != 1)}  {now.waiting} waiting  {now.batches:,} batches{failed}"
        )

    return text
