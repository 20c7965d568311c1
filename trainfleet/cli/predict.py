"""`trainfleet predict`: what a recipe's trained model says of each row, streamed to a folder of Parquet parts."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from trainfleet.cli.asked import CERTS, DEVICE, FEED, FOLDER, LISTEN, STREAM, WEIGHTS, Asked
from trainfleet.cli.train import make_importable


def predict(
    context: typer.Context,
    recipe: Path = typer.Argument(..., help="A YAML file.", metavar="RECIPE", show_default=False),
    overrides: list[str] | None = typer.Argument(
        None, help="Values that beat all others, such as data.workers=8.", metavar="[SECTION.KEY=VALUE]..."
    ),
    to: Path = typer.Option(..., "--to", help="Where the predictions go.", metavar="FOLDER", show_default=False),
    top_k: int = typer.Option(1, "--top-k", help="So many classes of each row, the most probable first.", min=1),
    confidence: float = typer.Option(
        0.0, "--confidence", help="Leave out rows whose best probability is below it.", min=0.0, max=1.0
    ),
    probabilities: bool = typer.Option(False, "--probabilities", help="Those of all classes too."),
    fresh: bool = typer.Option(False, "--fresh", help="Begin the folder anew."),
    stream: str = STREAM,
    weights: str | None = WEIGHTS,
    device: str | None = DEVICE,
    feeders: list[str] | None = FEED,
    listen: str | None = LISTEN,
    folder: Path | None = FOLDER,
    certs: Path | None = CERTS,
) -> None:
    """Write what a recipe's trained model says of each row, as Parquet.

    After any end the same command goes on. With --feed this host has the data and the model stands on
    another: `trainfleet gpu-service RECIPE` there.
    """
    from trainfleet import log
    from trainfleet.cli.progress import RowProgress
    from trainfleet.config import load_config
    from trainfleet.serve import predict as predicted
    from trainfleet.training.inference import batches_of, class_names
    from trainfleet.training.recipe import Recipe

    settings = load_config(Recipe, file=recipe, overrides=overrides or []).value
    make_importable(recipe.parent)
    log.setup("debug" if context.obj else "info")
    asked = Asked(
        feeders=feeders or [], listen=listen, folder=folder, certs=certs,
        weights=weights, device=device,
    )  # fmt: skip
    try:
        with (
            batches_of(settings, stream) as batches,
            asked.opened(settings, recipe) as model,
            RowProgress("predict") as progress,
        ):
            found = predicted(
                model,
                batches,
                top_k=top_k,
                confidence=confidence,
                probabilities=probabilities,
                to=to,
                fresh=fresh,
                classes=class_names(batches),
                progress=progress.tell,
            )
    except KeyboardInterrupt:
        again = "the same command, without --fresh, goes on" if fresh else "the same command goes on"
        print(f"Stopped. What was predicted is in {to}, and {again}.", file=sys.stderr)
        raise
    print(found, flush=True)
