"""`trainfleet validate`: how right a recipe's trained model is, computed here or where the GPU is."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from trainfleet.cli.asked import CERTS, DEVICE, FEED, FOLDER, LISTEN, STREAM, WEIGHTS, Asked
from trainfleet.cli.train import make_importable


def validate(
    context: typer.Context,
    recipe: Path = typer.Argument(..., help="A YAML file.", metavar="RECIPE", show_default=False),
    overrides: list[str] | None = typer.Argument(
        None, help="Values that beat all others, such as data.workers=8.", metavar="[SECTION.KEY=VALUE]..."
    ),
    stream: str = STREAM,
    picture: Path | None = typer.Option(None, "--picture", help="Draw the confusion matrix there.", metavar="FILE"),
    to_json: Path | None = typer.Option(None, "--json", help="Write all numbers there.", metavar="FILE"),
    weights: str | None = WEIGHTS,
    device: str | None = DEVICE,
    feeders: list[str] | None = FEED,
    listen: str | None = LISTEN,
    folder: Path | None = FOLDER,
    certs: Path | None = CERTS,
) -> None:
    """Say how right a recipe's trained model is.

    Loss, accuracy, precision and recall of each class; or the errors of a model that gives values. With --feed
    this host has the data and the model stands on another: `trainfleet gpu-service RECIPE` there.
    """
    from trainfleet import log
    from trainfleet.cli.progress import RowProgress
    from trainfleet.config import load_config
    from trainfleet.deps import installed, require
    from trainfleet.serve import validate as validated
    from trainfleet.store.file import write_file
    from trainfleet.training.inference import batches_of, class_names
    from trainfleet.training.recipe import Recipe

    settings = load_config(Recipe, file=recipe, overrides=overrides or []).value
    make_importable(recipe.parent)
    log.setup("debug" if context.obj else "info")
    asked = Asked(
        feeders=feeders or [], listen=listen, folder=folder, certs=certs,
        weights=weights, device=device,
    )  # fmt: skip
    if picture is not None and installed("matplotlib") is None:  # importing it waits for the picture
        require("matplotlib", "monitor", purpose="The picture of the confusion matrix")
    with (
        batches_of(settings, stream) as batches,
        asked.opened(settings, recipe) as model,
        RowProgress("validate") as progress,
    ):
        found = validated(model, batches, classes=class_names(batches), progress=progress.tell)
    print(found, flush=True)
    if to_json is not None:
        write_file(to_json, (json.dumps(found.to_plain(), indent=2) + "\n").encode())
        print(f"{to_json}  has all numbers", flush=True)
    if picture is not None:
        print(f"{found.picture(picture)}  shows the confusion matrix", flush=True)
