"""`trainfleet train`: check a recipe, start its ranks, and end with what became of them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trainfleet.cli.fed import CERTS, Fed
from trainfleet.cli.way_in import HELP
from trainfleet.errors import ConfigError, LaunchError, RankFailed

if TYPE_CHECKING:
    from trainfleet.comm.environment import RankEnvironment
    from trainfleet.training.ranks.copies import Preloaded
    from trainfleet.training.recipe import Recipe

INTERRUPTED = 130
RESUME = ("auto", "never", "must")
FOR_RANKS = (
    "trainfleet.cli.train",
    "trainfleet.training.job",
    "trainfleet.training.trainer",
    "trainfleet.comm.torch_group",
    "trainfleet.comm.rendezvous",
    "pydantic.dataclasses",
    "torch._dynamo",  # the first optimizer imports it, compiled or not: half a second
    "torch.distributed.fsdp",
)
"""What ranks would import one by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """How many ranks are to be started, and where."""

    nproc: int
    nnodes: int
    node_rank: int | None
    rendezvous: str | None
    max_restarts: int

    @property
    def world_size(self) -> int:
        return self.nproc * self.nnodes

    @property
    def is_this_process(self) -> bool:
        """One rank that nobody has to watch needs no process of its own."""
        return self.world_size == 1 and self.max_restarts == 0


def train(
    context: typer.Context,
    recipe: Path = typer.Argument(..., help="A YAML file.", metavar="RECIPE", show_default=False),
    overrides: list[str] | None = typer.Argument(
        None, help="Values that beat all others, such as plan.zero=3.", metavar="[SECTION.KEY=VALUE]..."
    ),
    nproc: int | None = typer.Option(None, "--nproc", help="Processes on this host.  [default: 1]", min=1),
    nnodes: int = typer.Option(1, "--nnodes", help="Hosts; each runs the same command.", min=1),
    node_rank: int | None = typer.Option(None, "--node-rank", help="Number of this host; 0 is the rendezvous.", min=0),
    rendezvous: str | None = typer.Option(None, "--rendezvous", help="Where hosts meet.", metavar="HOST:PORT"),
    max_restarts: int = typer.Option(0, "--max-restarts", help="New starts of all ranks after a failure.", min=0),
    resume: str | None = typer.Option(None, "--resume", help="Sets checkpoint.resume.", metavar="auto|never|must"),
    feeders: list[str] | None = typer.Option(
        None,
        "--feed",
        help="Let this host make the batches, with `trainfleet feed RECIPE`; may be given again.",
        metavar="HOST:PORT|TOKEN",
    ),
    certs: Path | None = CERTS,
    tunnel: str | None = typer.Option(
        None, "--tunnel", help=f"In place of --feed, for one rank. {HELP}", metavar="WAY"
    ),
    own_workers: int | None = typer.Option(
        None, "--own-workers", help="With --feed: processes of this host that make batches too, of data here.", min=1
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check the recipe, start nothing."),
) -> None:
    """Train as a recipe says.

    Under torchrun, srun or mpirun it is one rank of those that were started, unless --node-rank is given; otherwise
    it starts them itself.
    """
    from trainfleet.comm.environment import RankEnvironment
    from trainfleet.config import load_config
    from trainfleet.training.recipe import Recipe

    settings = load_config(Recipe, file=recipe, overrides=[*(overrides or []), *_resume_override(resume)]).value
    fed = Fed(feeders=feeders or (), certs=certs, tunnel=tunnel, own_workers=own_workers)
    make_importable(recipe.parent)
    environment = RankEnvironment.from_env()
    # With a number for this host it is the host's launcher, whatever started it: one task a node of srun, a pod.
    started = environment.launcher != "none" and node_rank is None
    if started and (nproc or 1, nnodes, max_restarts) != (1, 1, 0):
        raise LaunchError(
            f"This process is rank {environment.rank} of {environment.world_size} that {environment.launcher} has "
            "started, and does not start others. Leave out --nproc, --nnodes and --max-restarts; or let it start one "
            "process a host, and give each the number of its host by --node-rank."
        )
    ranks = Ranks(
        nproc=nproc or 1, nnodes=nnodes, node_rank=node_rank, rendezvous=rendezvous, max_restarts=max_restarts
    )
    if started:
        fed.refuse_among_started()
    debug = bool(context.obj)
    with fed.applied(settings, recipe) as settings:
        if settings.data.args.get("tunnel") is not None and not (started or ranks.is_this_process):
            raise ConfigError(
                "A tunnel leads to one process, and its token is good while that runs; here several are to be started, "
                "or anew after a failure.",
                hint="Open it on the other side, by trainfleet feed RECIPE --tunnel …: its token is good for all.",
            )
        if dry_run:
            _check_aloud(settings, environment.world_size if started else ranks.world_size)
        elif started or ranks.is_this_process:
            raise typer.Exit(train_here(settings, environment, debug=debug))
        else:
            raise typer.Exit(_start(settings, ranks, recipe.parent, debug=debug))


def train_here(recipe: Recipe, environment: RankEnvironment, *, debug: bool) -> int:
    """Train as one rank, in this process; the exit code."""
    from trainfleet import log
    from trainfleet.comm.environment import share_cores
    from trainfleet.training.job import run
    from trainfleet.training.ranks.failure import reported_failures

    share_cores(environment)
    log.setup("debug" if debug else "info", environment.rank, environment.world_size)
    with reported_failures():
        outcome = run(recipe)
    # A launcher takes any other code for a failure, and would start again what was told to end.
    return INTERRUPTED if outcome.reason == "interrupted" and environment.launcher == "none" else 0


def make_importable(folder: Path) -> None:
    """Let import paths of a recipe name modules beside it and in the working directory, as a script's could."""
    for place in (str(Path.cwd()), str(folder.resolve())):
        if place not in sys.path:
            sys.path.insert(0, place)


def _start(recipe: Recipe, ranks: Ranks, folder: Path, *, debug: bool) -> int:
    """Check what can be checked here, then start this host's ranks with the recipe as it is now, and wait."""
    from trainfleet import log
    from trainfleet.comm.environment import threads_per_rank
    from trainfleet.training.ranks.copies import Preloaded

    log.setup("debug" if debug else "info")
    # It imports while the recipe is checked.
    with Preloaded(FOR_RANKS, threads=threads_per_rank(ranks.nproc)) as preloaded:
        from trainfleet.training.dry_run import check

        check(recipe, ranks.world_size)
        _refuse_folder_in_use(Path(recipe.folder))
        return _run(recipe, ranks, folder, preloaded, debug=debug)


def _run(recipe: Recipe, ranks: Ranks, folder: Path, preloaded: Preloaded, *, debug: bool) -> int:
    from trainfleet.config import to_yaml
    from trainfleet.training.ranks.failure import leave_report
    from trainfleet.training.ranks.launch import run_elastic

    with tempfile.TemporaryDirectory(prefix="trainfleet-") as place:
        # Ranks that start anew must not read a file, or an environment, that somebody has changed meanwhile.
        resolved = Path(place) / "recipe.yaml"
        resolved.write_text(to_yaml(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "trainfleet.cli.rank", str(resolved), str(folder.resolve())]
        try:
            return run_elastic(
                [*command, *(["--debug"] if debug else [])],
                nproc=ranks.nproc,
                nnodes=ranks.nnodes,
                node_rank=ranks.node_rank,
                rendezvous=ranks.rendezvous,
                max_restarts=ranks.max_restarts,
                preloaded=preloaded,
            )
        except RankFailed as error:
            if report := leave_report(Path(recipe.folder), error):
                error.hint = " ".join([*([error.hint] if error.hint else []), f"The report is in {report}."])
            raise


def _refuse_folder_in_use(folder: Path) -> None:
    """StoreError, with whose it is, before any rank is started; rank 0 takes the folder later."""
    from trainfleet.monitor import RunFolder

    if folder.is_dir():
        RunFolder(folder).hold().close()


def _check_aloud(recipe: Recipe, world_size: int) -> None:
    from trainfleet.training.dry_run import check

    for line in check(recipe, world_size):
        print(line)
    print("The recipe can be trained; nothing was started.")


def _resume_override(resume: str | None) -> Sequence[str]:
    if resume is None:
        return []
    if resume not in RESUME:
        raise ConfigError(f"--resume is {resume!r}; allowed: one of {', '.join(RESUME)}.")
    return [f"checkpoint.resume={resume}"]
