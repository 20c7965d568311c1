"""`trainfleet`: the verbs, and how errors become a sentence and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from trainfleet.cli import (
    checkpoint,
    config,
    doctor,
    feed,
    gpu_service,
    launch,
    link,
    predict,
    relay,
    replay,
    runs,
    train,
    validate,
    verify,
)
from trainfleet.errors import TrainfleetError

# Plain help and plain tracebacks: rich costs 0.1 s of every start.
app = typer.Typer(
    help="Train one plain PyTorch model on whatever machines there are, and trust the result.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,
)
app.command("train")(train.train)
app.command("feed")(feed.feed)
app.command("gpu-service")(gpu_service.gpu_service)
app.add_typer(launch.app, name="launch")
app.command("verify")(verify.verify)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(config.app, name="config")
app.command("validate")(validate.validate)
app.command("predict")(predict.predict)
app.add_typer(runs.app, name="runs")
app.command("replay")(replay.replay)
app.command("doctor")(doctor.doctor)
app.command("relay")(relay.relay)
app.command("link")(link.link)


def _show_version(asked: bool) -> None:
    if asked:
        from trainfleet.deps import installed

        print(f"trainfleet {installed('trainfleet')}, torch {installed('torch') or 'not installed'}")
        raise typer.Exit


@app.callback()
def _all_verbs(
    debug: bool = typer.Option(False, "--debug", help="Log everything and show tracebacks; may stand anywhere."),
    version: bool = typer.Option(False, "--version", help="Show versions and exit.", callback=_show_version),
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a verb and exit: 0, the code of the error (docs/exit_codes.md), or 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        app(args=[argument for argument in given if argument != "--debug"], prog_name="trainfleet", obj=debug)
    except TrainfleetError as error:
        if debug:
            import traceback

            traceback.print_exc()
        _say(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    raise AssertionError("typer ends by SystemExit")


def _say(error: TrainfleetError) -> None:
    print(f"trainfleet: {error}", file=sys.stderr)
    if error.hint:
        print(f"  {error.hint}", file=sys.stderr)


if __name__ == "__main__":
    main()
