"""`trainfleet verify`: does the plan of a recipe compute what one process computes?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from trainfleet.training.proof.verdict import Verdict


def verify(
    context: typer.Context,
    recipe: Path = typer.Argument(..., help="A YAML file.", metavar="RECIPE", show_default=False),
    overrides: list[str] | None = typer.Argument(
        None, help="Values that beat all others, such as plan.zero=3.", metavar="[SECTION.KEY=VALUE]..."
    ),
    nproc: int | None = typer.Option(
        None, "--nproc", help="Processes of the plan.  [default: as few as it needs, at least 2]", min=1
    ),
    steps: int = typer.Option(3, "--steps", help="Optimizer steps to compare.", min=1),
    as_json: bool = typer.Option(False, "--json", help="For programs."),
) -> None:
    """Prove a plan against one process.

    The recipe's own model takes its first steps both ways; the first tensor that differs is named, and the code is 1.
    """
    from trainfleet import log
    from trainfleet.cli.train import make_importable
    from trainfleet.config import load_config
    from trainfleet.training.proof import verify_recipe as proof
    from trainfleet.training.recipe import Recipe

    settings = load_config(Recipe, file=recipe, overrides=overrides or []).value
    make_importable(recipe.parent)
    log.setup("debug" if context.obj else "warning")
    nproc = nproc or settings.plan.fewest_ranks()
    plan = settings.plan.for_world(nproc)
    verdict = proof.verify_recipe(settings, nproc, steps=steps)
    if as_json:
        _print_json(verdict)
    else:
        print(f"{plan} on {nproc} process{'es' * (nproc != 1)}, {steps} step{'s' * (steps != 1)}")
        for remark in verdict.remarks:
            print(f"note: {remark}")
        print(verdict)
    raise typer.Exit(0 if verdict.holds else 1)


def _print_json(verdict: Verdict) -> None:
    import dataclasses
    import json
    import math

    content = {"holds": verdict.holds, **dataclasses.asdict(verdict)}
    for difference in (content["first"], content["largest"]):
        if difference is not None and math.isinf(difference["deviation"]):
            difference["deviation"] = None  # JSON has no infinity; the tensor is missing, or of another shape
    print(json.dumps(content, indent=2))
