"""How soon a run goes on after a rank was killed: from SIGKILL to the next checkpoint that the ranks commit.

    python benchmarks/recovery.py [--quick]

The same GPT is trained on 2 processes, with a checkpoint after every step: as our recipe under `trainfleet train
--max-restarts`, and as a plain script (DDP, torch.save and a rename, no fsync) under torchrun --standalone, whose
rendezvous is c10d (with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which restarts on gloo fail or hang in torch
2.13). They take turns. In each turn one rank, rank 0 and 1 in turn, gets SIGKILL at a random moment after
a few steps; the clock stops at the first checkpoint that ranks commit which were started after that.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from measuring.ranks import ROOT, environment
from measuring.rounds import interval, ratios, shown
from measuring.table import RESULTS, Report, Table

SCRIPT = Path(__file__).parent / "loops" / "restarted_script.py"
RECIPE = ROOT / "recipes" / "gpt_stdlib.yaml"
OURS, TORCHRUN = "trainfleet", "torchrun"
NPROC, STEPS_BEFORE, RESTARTS, PAUSE_SECONDS, DEADLINE_SECONDS = 2, 5, 10, 0.002, 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    command: Callable[[Path], Sequence[str]]
    """Trains in a folder until it is ended."""
    committed: Callable[[Path], dict[str, str]]
    """The checkpoints that stand in the folder: name, and which start of the ranks wrote it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--no-rivals", action="store_true", help="leave torchrun out")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    contenders = {OURS: Contender(command=_train, committed=_manifests)}
    if not options.no_rivals:
        contenders[TORCHRUN] = Contender(command=_torchrun, committed=_files)
    report = Report(name="recovery", summary=__doc__.split("\n\n")[2].replace("\n", " "))
    report.add(table_of(measured(contenders, 1 if options.quick else options.rounds)))
    report.write(options.results)


def measured(contenders: dict[str, Contender], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Of each turn: seconds until new ranks were started, and until one of their checkpoints stood."""
    draw = random.Random(0)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for i in range(rounds):
        wait = draw.uniform(0, 0.5)
        for name in draw.sample(list(contenders), len(contenders)):
            found[name].append(turn(contenders[name], victim=i % NPROC, wait=wait))
    return found


def turn(contender: Contender, *, victim: int, wait: float) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(prefix="trainfleet-bench-") as place:
        folder = Path(place)
        with running(contender.command(folder), folder) as agent:
            _await(lambda: max(contender.committed(folder), default="") >= _step(STEPS_BEFORE), agent, folder)
            time.sleep(wait)
            before = _ranks(agent)
            writers = set(contender.committed(folder).values())
            begun = time.perf_counter()
            before[victim].kill()
            # Looking at processes costs time that the ranks need: so rarely, and not once they have been seen.
            started = _await(lambda: len(new := _ranks(agent)) == NPROC and before != new, agent, folder, 0.05)
            ended = _await(lambda: not writers.issuperset(contender.committed(folder).values()), agent, folder)
            return started - begun, ended - begun


def table_of(found: dict[str, list[tuple[float, float]]]) -> Table:
    rows: list[list[str | float | None]] = []
    totals = {name: [total for _, total in turns] for name, turns in found.items()}
    for name, turns in found.items():
        low, high = interval(totals[name])
        against = ratios(totals[name], totals[TORCHRUN]) if TORCHRUN in totals else None
        rows.append(
            [
                name,
                statistics.median(totals[name]),
                f"{low:.2f} to {high:.2f}",
                max(totals[name]),
                statistics.median(started for started, _ in turns),
                statistics.median(against) if against and name != TORCHRUN else None,
                shown(interval(against)) if against and name != TORCHRUN else None,
            ]
        )
    return Table(
        title=f"SIGKILL of a rank to the next committed checkpoint, {NPROC} processes, "
        f"{len(next(iter(found.values())))} rounds",
        columns=["run", "seconds", "95 % interval", "longest", "of which to new ranks", "to torchrun", "95 % interval"],
        rows=rows,
        notes=["Medians. To torchrun: round by round. The target is 1 or less."],
    )


def _train(folder: Path) -> Sequence[str]:
    settings = [f"folder={folder}/run", "plan.zero=0", "checkpoint.every=1", "checkpoint.keep_last=2"]
    settings += ["data.evaluation=null", "train.evaluate_every=null", "train.finish=null", "train.steps=1000000"]
    verb = [sys.executable, "-m", "trainfleet.cli.main", "train", str(RECIPE), "--nproc", str(NPROC)]
    return [*verb, "--max-restarts", str(RESTARTS), *settings]


def _torchrun(folder: Path) -> Sequence[str]:
    # Torch 2.13 gives new ranks the store of the old ones, in which gloo finds addresses that are gone: without this
    # setting most restarts fail once more, and some hang.
    launcher = [
        "env",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={NPROC}",
    ]
    return [*launcher, f"--max-restarts={RESTARTS}", str(SCRIPT), str(folder)]


def _manifests(folder: Path) -> dict[str, str]:
    found = {}
    for manifest in (folder / "run" / "checkpoints").glob("step-*/manifest.json"):
        try:
            found[manifest.parent.name] = str(json.loads(manifest.read_text())["run"])
        except OSError:  # pruned meanwhile
            continue
    return found


def _files(folder: Path) -> dict[str, str]:
    return {name[0]: name[1] for file in folder.glob("step-*.pt") if (name := file.name.split("."))}


def _step(number: int) -> str:
    return f"step-{number:08d}"


@contextmanager
def running(command: Sequence[str], folder: Path) -> Iterator[psutil.Popen]:
    paths = {**environment(), "PYTHONPATH": str(ROOT / "recipes")}
    with (folder / "output").open("w") as output:
        agent = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=paths, cwd=ROOT)
    try:
        yield agent
    finally:
        children = [] if agent.poll() is not None else agent.children(recursive=True)
        for process in [agent, *children]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        agent.wait()
        psutil.wait_procs(children, 10)


def _ranks(agent: psutil.Popen) -> list[psutil.Process]:
    """The ranks that have been started, in order: ours bear their number as name, torchrun's in their environment."""
    found = {}
    below = agent.children()
    for process in [*below, *(child for each in below for child in _children(each))]:
        with suppress(psutil.Error):  # it ends
            kind, _, number = process.name().partition(" ")
            rank = number if kind == "rank" else process.environ().get("LOCAL_RANK")
            is_rank = kind == "rank" or process.ppid() == agent.pid
            if rank is not None and is_rank and process.status() != psutil.STATUS_ZOMBIE:
                found[int(rank)] = process
    return [found[rank] for rank in sorted(found)]


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.Error:
        return []


def _await(is_so: Callable[[], bool], agent: psutil.Popen, folder: Path, pause: float = PAUSE_SECONDS) -> float:
    """When it was so."""
    ends = time.perf_counter() + DEADLINE_SECONDS
    while not is_so():
        if time.perf_counter() > ends or agent.poll() is not None:
            raise SystemExit(f"{' '.join(agent.args)} did not go on:\n{(folder / 'output').read_text()[-40000:]}")
        time.sleep(pause)
    return time.perf_counter()


if __name__ == "__main__":
    os.environ.pop("RANK", None)
    main()
