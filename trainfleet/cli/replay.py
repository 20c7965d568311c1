"""`trainfleet replay`: one step of a run again, under inspection."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import typer

from trainfleet.cli.fed import CERTS, Fed

PROGRESS_SECONDS = 1.0
"""Between two lines of progress."""


def replay(
    context: typer.Context,
    run: Path = typer.Argument(..., help="The folder of a run.", metavar="RUN", show_default=False),
    overrides: list[str] | None = typer.Argument(
        None,
        help="Values that beat those of the run's recipe, such as data.args.path=…",
        metavar="[SECTION.KEY=VALUE]...",
    ),
    step: int = typer.Option(..., "--step", help="The step to take again.", min=1, show_default=False),
    nproc: int | None = typer.Option(
        None, "--nproc", help="Processes on this host.  [default: as many as the run had]", min=1
    ),
    batch: Path | None = typer.Option(
        None, "--batch", help="Micro-batches that the run has saved, in place of that step's data.", metavar="FILE"
    ),
    feeders: list[str] | None = typer.Option(
        None,
        "--feed",
        help="For a run that was fed: who makes its batches again; may be given again.",
        metavar="HOST:PORT|TOKEN",
    ),
    certs: Path | None = CERTS,
    as_json: bool = typer.Option(False, "--json", help="For programs."),
) -> None:
    """Take one step of a run again and show what every module gave.

    It goes on from the newest checkpoint before the step, and takes the steps in between as the run did. The report is
    left in RUN/replay; nothing else of the run is changed, and it may be under way.
    """
    import json

    from trainfleet import log
    from trainfleet.cli.train import make_importable
    from trainfleet.training import replay as again

    log.setup("debug" if context.obj else "warning")
    for place in reversed(again.places_of_modules(run)):
        make_importable(place)
    make_importable(Path.cwd())
    fed = Fed(feeders=feeders or (), certs=certs)
    found = again.replay(
        run,
        step,
        nproc=nproc,
        batch=batch,
        overrides=overrides or [],
        feeders=fed.feeders,
        certificates=fed.certs,
        tell=_Told(),
    )
    print(json.dumps(found.to_plain(), indent=2) if as_json else "\n".join(found.lines()))


class _Told:
    """Shows lines on standard error, not more often than a person reads them."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS:
            self._last = now
            print(line, file=sys.stderr, flush=True)
