"""`trainfleet launch`: onto the machines of SLURM, Kubernetes, Ray, or a list of hosts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trainfleet.errors import LaunchError

if TYPE_CHECKING:
    from trainfleet.launchers.command import Command
    from trainfleet.training.recipe import Recipe

app = typer.Typer(
    help="Start a recipe on the machines of SLURM, Kubernetes, Ray, or a list of hosts.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

RECIPE = typer.Argument(..., help="A YAML file.", metavar="RECIPE", show_default=False)
OVERRIDES = typer.Argument(
    None, help="Values that beat all others, such as plan.zero=3.", metavar="[SECTION.KEY=VALUE]..."
)
NODES = typer.Option(1, "--nodes", help="Hosts.", min=1)
NPROC = typer.Option(1, "--nproc-per-node", "--nproc", help="Processes on each host.", min=1)
RESTARTS = typer.Option(3, "--max-restarts", help="New starts of all ranks after a failure.", min=0)
OUTPUT = typer.Option("-", "--output", "-o", help="File to write; - for the terminal.", metavar="FILE")
CHECK = typer.Option(True, "--check/--no-check", help="Build the model and open the data here first.")
PYTHON = typer.Option(None, "--python", help="Interpreter that has trainfleet, on the hosts.  [default: this one]")
DIRECTORY = typer.Option(None, "--directory", help="Where the run starts, on the hosts.  [default: here]")


@app.command("slurm")
def slurm(
    recipe: Path = RECIPE,
    overrides: list[str] | None = OVERRIDES,
    nodes: int = NODES,
    nproc: int = NPROC,
    time: str = typer.Option(..., "--time", help="Such as 30, 12:00:00 or 2-00.", show_default=False),
    partition: str | None = typer.Option(None, "--partition"),
    account: str | None = typer.Option(None, "--account"),
    qos: str | None = typer.Option(None, "--qos"),
    name: str = typer.Option("trainfleet", "--name", help="Of the job."),
    gpus: int | None = typer.Option(None, "--gpus-per-node", min=1),
    cpus: int | None = typer.Option(None, "--cpus-per-node", help="[default: one a process]", min=1),
    memory: str | None = typer.Option(None, "--memory", help="Of a node, such as 64G."),
    log: str = typer.Option("slurm-%j.out", "--log", help="What the job says, in names of SLURM's."),
    end_seconds: int = typer.Option(180, "--end-seconds", help="Save and end so long before the time is over."),
    options: list[str] | None = typer.Option(None, "--sbatch", help="A further option, such as --exclusive."),
    before: list[str] | None = typer.Option(None, "--before", help="A line of the script before the run starts."),
    max_restarts: int = RESTARTS,
    python: str | None = PYTHON,
    directory: str | None = DIRECTORY,
    check: bool = CHECK,
    output: str = OUTPUT,
) -> None:
    """Write a file for sbatch. The run saves and is queued again before its time is over."""
    from trainfleet.launchers.slurm import Allocation, sbatch_script

    python = python or sys.executable
    command = _command(recipe, overrides, nodes, nproc, max_restarts, python=python)
    allocation = Allocation(
        time=time,
        name=name,
        partition=partition,
        account=account,
        qos=qos,
        gpus_per_node=gpus,
        cpus_per_node=cpus,
        memory=memory,
        output=log,
        end_seconds=end_seconds,
        options=tuple(options or ()),
        before=tuple(before or ()),
    )
    _check(recipe, command, code_is_here=check)
    script = sbatch_script(command, allocation, directory=directory or str(Path.cwd()), python=python)
    _write(script, output, executable=True)


def _command(
    recipe: Path, overrides: list[str] | None, nodes: int, nproc: int, max_restarts: int, *, python: str
) -> Command:
    from trainfleet.launchers.command import Command

    return Command(
        recipe=str(recipe),
        nodes=nodes,
        nproc_per_node=nproc,
        overrides=tuple(overrides or ()),
        max_restarts=max_restarts,
        program=(python, "-m", "trainfleet.cli.main"),
    )


def _check(path: Path, command: Command, *, code_is_here: bool) -> Recipe:
    """The recipe, checked for so many hosts; remarks go to the terminal, beside what is written."""
    from trainfleet.cli.train import make_importable
    from trainfleet.config import load_config
    from trainfleet.launchers.command import check_command
    from trainfleet.training.recipe import Recipe

    recipe = load_config(Recipe, file=path, overrides=list(command.overrides)).value
    make_importable(path.parent)
    for remark in check_command(recipe, command, code_is_here=code_is_here):
        print(f"note: {remark}", file=sys.stderr)
    return recipe


def _write(text: str, output: str, *, executable: bool = False) -> None:
    if output == "-":
        sys.stdout.write(text)
        return
    path = Path(output)
    try:
        path.write_text(text, encoding="utf-8")
        if executable:
            path.chmod(0o755)
    except OSError as exc:
        raise LaunchError(f"{output} cannot be written: {exc.strerror}.") from exc
