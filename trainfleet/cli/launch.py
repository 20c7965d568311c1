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
    _check(recipe, command, overrides, code_is_here=check)
    script = sbatch_script(command, allocation, directory=directory or str(Path.cwd()), python=python)
    _write(script, output, executable=True)


@app.command("kubernetes")
def kubernetes(
    recipe: Path = RECIPE,
    overrides: list[str] | None = OVERRIDES,
    image: str = typer.Option(..., "--image", help="With trainfleet, torch and your code.", show_default=False),
    claim: str = typer.Option(..., "--claim", help="PersistentVolumeClaim of the run folder.", show_default=False),
    nodes: int = NODES,
    nproc: int = NPROC,
    kind: str = typer.Option("jobset", "--kind", metavar="jobset|pytorchjob"),
    name: str = typer.Option("trainfleet", "--name", help="Of the job."),
    namespace: str | None = typer.Option(None, "--namespace"),
    gpus: int = typer.Option(0, "--gpus-per-node", min=0),
    gpu_resource: str = typer.Option("nvidia.com/gpu", "--gpu-resource"),
    cpus: str | None = typer.Option(None, "--cpus-per-node", help="Such as 16."),
    memory: str | None = typer.Option(None, "--memory", help="Of a pod, such as 64Gi."),
    shared_memory: str = typer.Option("8Gi", "--shared-memory", help="Size of /dev/shm."),
    mount: str = typer.Option("/mnt/runs", "--mount", help="Where the claim is mounted."),
    claim_size: str | None = typer.Option(None, "--claim-size", help="Make the claim too, such as 500Gi."),
    storage_class: str | None = typer.Option(None, "--storage-class", help="Of the claim that is made."),
    max_restarts: int = RESTARTS,
    check: bool = CHECK,
    output: str = OUTPUT,
) -> None:
    """Write manifests for kubectl apply. The recipe goes with them, as it is now."""
    from trainfleet.config import to_yaml
    from trainfleet.launchers.command import Command
    from trainfleet.launchers.kubernetes import RECIPE as IN_POD
    from trainfleet.launchers.kubernetes import Pods, below, manifests

    # Pods that start anew go on, even where the recipe says to begin.
    command = Command(recipe=IN_POD, nodes=nodes, nproc_per_node=nproc, max_restarts=max_restarts, resume="auto")
    pods = Pods(
        image=image,
        claim=claim,
        name=name,
        namespace=namespace,
        mount=mount,
        gpus=gpus,
        gpu_resource=gpu_resource,
        cpus=cpus,
        memory=memory,
        shared_memory=shared_memory,
        claim_size=claim_size,
        storage_class=storage_class,
    )
    settings = below(_check(recipe, command, overrides, code_is_here=check), pods.mount)
    made = manifests(command, pods, recipe=to_yaml(settings), kind=kind)
    _write("---\n".join(to_yaml(manifest) for manifest in made), output)


@app.command("ssh")
def ssh(
    recipe: Path = RECIPE,
    overrides: list[str] | None = OVERRIDES,
    hosts: str | None = typer.Option(None, "--hosts", help="The first is the rendezvous.", metavar="A,B,..."),
    hosts_file: Path | None = typer.Option(None, "--hosts-file", help="Lines of: name slots=4", metavar="FILE"),
    nproc: int | None = typer.Option(
        None, "--nproc-per-node", "--nproc", help="Processes on each host.  [default: its slots, or 1]", min=1
    ),
    rendezvous: str | None = typer.Option(
        None, "--rendezvous", help="Where hosts meet.  [default: first host, port 29500]", metavar="HOST:PORT"
    ),
    max_restarts: int = typer.Option(0, "--max-restarts", help="New starts of all ranks after a failure.", min=0),
    resume: str | None = typer.Option(None, "--resume", help="Sets checkpoint.resume.", metavar="auto|never|must"),
    python: str | None = PYTHON,
    directory: str | None = DIRECTORY,
    check: bool = CHECK,
) -> None:
    """Train on hosts that ssh reaches without a password, and stay until the run has ended on all of them."""
    from trainfleet.comm.environment import DEFAULT_PORT
    from trainfleet.launchers.hosts import check_meeting, nproc_of, read_hosts, read_hosts_file
    from trainfleet.launchers.ssh import Far, run_over_ssh

    if (hosts is None) == (hosts_file is None):
        raise LaunchError("Name the hosts by --hosts A,B or by --hosts-file FILE, one of the two.")
    listed = read_hosts(hosts) if hosts is not None else read_hosts_file(hosts_file or Path())
    python = python or sys.executable
    command = _command(
        recipe, overrides, len(listed), nproc_of(listed, nproc), max_restarts, python=python, resume=resume
    )
    _check(recipe, command, overrides, code_is_here=check)
    first, port = _endpoint(rendezvous) if rendezvous else (listed[0].name, DEFAULT_PORT)
    check_meeting(first, listed)
    far = Far(directory=directory or str(Path.cwd()), python=python, first=first, port=port)
    raise typer.Exit(run_over_ssh(command, listed, far, say=lambda line: print(line, flush=True)))


@app.command("ray")
def ray(
    recipe: Path = RECIPE,
    overrides: list[str] | None = OVERRIDES,
    nodes: int = NODES,
    nproc: int = NPROC,
    address: str | None = typer.Option(None, "--address", help="Of the cluster.  [default: RAY_ADDRESS, else here]"),
    cpus: float = typer.Option(1.0, "--cpus-per-rank", min=0.01),
    gpus: float = typer.Option(0.0, "--gpus-per-rank", min=0.0),
    wait: float = typer.Option(120.0, "--wait", help="Seconds for the cluster to have room.", min=0.1),
    max_restarts: int = typer.Option(0, "--max-restarts", help="New starts of all ranks after a failure.", min=0),
    resume: str | None = typer.Option(None, "--resume", help="Sets checkpoint.resume.", metavar="auto|never|must"),
    python: str | None = PYTHON,
    directory: str | None = DIRECTORY,
    check: bool = CHECK,
) -> None:
    """Train on the machines of a Ray cluster, an actor a host, and stay until the run has ended."""
    from trainfleet.launchers.ray import Cluster, run_on_ray

    command = _command(recipe, overrides, nodes, nproc, max_restarts, python=python or sys.executable, resume=resume)
    _check(recipe, command, overrides, code_is_here=check)
    cluster = Cluster(
        directory=directory or str(Path.cwd()),
        address=address,
        cpus_per_rank=cpus,
        gpus_per_rank=gpus,
        wait_seconds=wait,
    )
    raise typer.Exit(run_on_ray(command, cluster, say=lambda line: print(line, flush=True)))


def _endpoint(rendezvous: str) -> tuple[str, int]:
    host, colon, port = rendezvous.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise LaunchError(f"The rendezvous is {rendezvous!r}; write host:port, such as node-0:29500.")
    return host, int(port)


def _command(
    recipe: Path,
    overrides: list[str] | None,
    nodes: int,
    nproc: int,
    max_restarts: int,
    *,
    python: str,
    resume: str | None = None,
) -> Command:
    from trainfleet.launchers.command import Command

    return Command(
        recipe=str(recipe),
        nodes=nodes,
        nproc_per_node=nproc,
        overrides=tuple(overrides or ()),
        max_restarts=max_restarts,
        resume=resume,
        program=(python, "-m", "trainfleet.cli.main"),
    )


def _check(path: Path, command: Command, overrides: list[str] | None, *, code_is_here: bool) -> Recipe:
    """The recipe, checked for so many hosts; remarks go to the terminal, beside what is written."""
    from trainfleet.cli.train import make_importable
    from trainfleet.config import load_config
    from trainfleet.launchers.command import check_command
    from trainfleet.training.recipe import Recipe

    recipe = load_config(Recipe, file=path, overrides=overrides or []).value
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
