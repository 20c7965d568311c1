"""`trainfleet runs`: what was trained, how it went, and how runs differ, in words, tables, pictures and CSV."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from trainfleet.cli.table import print_json, print_table
from trainfleet.errors import ConfigError, StoreError, TrainfleetError

if TYPE_CHECKING:
    from trainfleet.monitor.history import History

app = typer.Typer(
    help="List runs, show one, compare several, draw them.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

AS_JSON = typer.Option(False, "--json", help="As JSON, for programs.")
MAX_DEPTH = 3
"""Folders below the one that is listed in which runs are looked for."""
_RIGHT = ("steps", "loss", "validation", "tokens/s", "goodput", "time")


@app.command("list")
def list_(
    folder: Path = typer.Argument(Path("runs"), help="Where runs are; also a run itself.", metavar="[FOLDER]"),
    as_json: bool = AS_JSON,
) -> None:
    """The runs in a folder and below it, the newest last: how far they came, how fast, and how they ended."""
    from trainfleet.monitor.history import read_brief

    if not folder.is_dir():
        raise StoreError(f"There is no folder {folder}.", hint="Name the folder in which your runs are.")
    found: list[Mapping[str, Any]] = []
    for path in _runs_below(folder):
        try:
            found.append(read_brief(path))
        except TrainfleetError as error:  # one run that cannot be read must not hide the others
            found.append({"folder": str(path), "end": f"not readable: {error}"})
    found.sort(key=lambda each: each.get("went_on", 0.0))
    if as_json:
        print_json(found)
    elif found:
        head = ("run", "started", "steps", "loss", "validation", "tokens/s", "goodput", "time", "")
        print_table(head, [_row(each) for each in found], right=_RIGHT)
    else:
        print(f"There are no runs in {folder}.")


@app.command()
def show(
    run: Path = typer.Argument(..., help="A run folder.", metavar="RUN"),
    as_json: bool = AS_JSON,
    as_csv: bool = typer.Option(False, "--csv", help="Its steps as CSV, a column for each number."),
) -> None:
    """Everything worth knowing of one run, also of one under way."""
    from trainfleet.cli.run_page import print_run
    from trainfleet.monitor.history import read_run

    if as_csv:
        if as_json:
            raise ConfigError("--csv and --json are two answers; ask for one of them.")
        _print_csv(run)
        return
    found = read_run(run)
    if as_json:
        print_json(_plain(found))
    else:
        print_run(found, _usual_settings())


@app.command()
def compare(
    runs: list[Path] = typer.Argument(..., help="Two run folders or more.", metavar="RUN RUN..."),
    as_json: bool = AS_JSON,
) -> None:
    """Runs side by side: figures, settings and versions that differ, losses at equal steps and at equal time."""
    from dataclasses import asdict

    from trainfleet.cli.run_page import print_comparison
    from trainfleet.monitor.history import compare as compared
    from trainfleet.monitor.history import read_run
    from trainfleet.monitor.pictures import names_of

    if len(runs) < 2:
        raise ConfigError(f"compare needs two runs or more, and was given {len(runs)}.")
    read = [read_run(path) for path in runs]
    found = compared(read)
    if as_json:
        print_json({"runs": [str(path) for path in runs], **asdict(found)})
    else:
        print_comparison(names_of(read), read, found)


@app.command()
def plot(
    runs: list[Path] = typer.Argument(..., help="One run, or several to lay over one another.", metavar="RUN..."),
    output: Path | None = typer.Option(
        None, "-o", "--output", help="Folder of the pictures.  [default: RUN/pictures; of several: pictures]"
    ),
) -> None:
    """Pictures of loss, throughput, memory, and time by phase."""
    from trainfleet.monitor.drawing import need_matplotlib, write_png
    from trainfleet.monitor.history import read_run
    from trainfleet.monitor.pictures import MAX_RUNS, draw_pictures

    need_matplotlib("Drawing a run")
    read = [read_run(path) for path in runs]
    folder = output or (runs[0] / "pictures" if len(runs) == 1 else Path("pictures"))
    for name, figure in draw_pictures(read).items():
        write_png(figure, folder / f"{name}.png")
        print(folder / f"{name}.png")
    if (left_out := len(read) - MAX_RUNS) > 0:
        print(f"They show the first {MAX_RUNS} runs; {left_out} more cannot be told apart and are left out.")


def _runs_below(folder: Path, depth: int = 0) -> Iterator[Path]:
    from trainfleet.monitor.history import is_run

    if is_run(folder):
        yield folder
    elif depth < MAX_DEPTH:
        try:
            below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
        except OSError:  # not ours to look into
            return
        for path in below:
            yield from _runs_below(path, depth + 1)


def _row(run: Mapping[str, Any]) -> tuple[str, ...]:
    from trainfleet.cli.run_page import when
    from trainfleet.monitor.units import readable_duration, readable_loss, readable_rate

    def word(name: str, say: Any) -> str:
        return say(run[name]) if run.get(name) is not None else ""

    return (
        run["folder"],
        word("started", when),
        word("steps", "{:,}".format) + word("planned_steps", "/{:,}".format),
        word("loss", readable_loss),
        word("validation_loss", readable_loss),
        word("tokens_per_second", readable_rate),
        word("goodput", lambda share: f"{100 * share:.0f}%"),
        word("wall_seconds", readable_duration),
        f"{run['end'][:59]}…" if len(run["end"]) > 60 and "started" in run else run["end"],
    )


def _plain(run: History) -> Mapping[str, Any]:
    """For programs: everything but the steps, which metrics.jsonl has."""
    from dataclasses import asdict

    from trainfleet.monitor.history import figures

    return {
        "folder": str(run.folder),
        "running": run.running,
        "figures": figures(run),
        "time": run.goodput.parts,
        "starts": [asdict(start) for start in run.starts],
        "evaluations": [asdict(each) for each in run.evaluations],
        "saves": asdict(run.saves),
        "tracked": {name: asdict(each) for name, each in run.tracked.items()},
        "tracked_values_left_out": run.num_left_out,
        "baselines": run.baselines,
        "summary": run.summary,
        "ranks": [asdict(rank) for rank in run.ranks.ranks],
        "slow_ranks": [asdict(slow) for slow in run.ranks.slow],
        "anomalies": list(run.anomalies),
        "anomaly_counts": [[*key, count] for key, count in run.anomaly_counts.items()],
        "alerts": run.alert_counts,
        "skipped_samples": run.skipped_samples,
        "unreadable_lines": run.num_torn,
        "recipe": run.recipe,
        "environments": run.environments,
    }


def _usual_settings() -> Mapping[str, Any]:
    from trainfleet.config import to_plain
    from trainfleet.training.recipe import Recipe

    plain: Mapping[str, Any] = to_plain(Recipe())
    return plain


def _print_csv(run: Path) -> None:
    from trainfleet.monitor.history import is_run, read_run, standing
    from trainfleet.monitor.run_folder import RunFolder
    from trainfleet.monitor.wide_table import write_wide_table

    if not is_run(run):
        read_run(run)  # says what is wrong
    left_out = write_wide_table(standing(RunFolder(run).metrics), sys.stdout)
    if left_out:
        print(f"{left_out:,} tracked names beyond the columns of a table are left out.", file=sys.stderr)
