"""How long the first moment takes: import, help, and from a command to the first step.

    python benchmarks/startup.py [--quick]

Each line is a fresh process, and all take turns; a figure is the median over rounds. First step: from the start of
the command until the first optimizer step is done, of the same GPT on the same text, as our recipe on the one hand
and as a plain script of PyTorch on the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measuring.machine import version_of
from measuring.ranks import ROOT, environment
from measuring.rounds import interval
from measuring.table import RESULTS, Report, Table

BIN = Path(sys.executable).parent
PLAIN = Path(__file__).parent / "loops" / "plain_script.py"
RECIPE = ROOT / "recipes" / "gpt_stdlib.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, one process, only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--no-rivals", action="store_true", help="leave the launchers of others out")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    report = Report(name="startup", summary=__doc__.split("\n\n")[2].replace("\n", " "))
    report.add(commands(rounds, rivals=not options.no_rivals))
    report.add(first_steps(rounds, (1,) if options.quick else (1, 2), rivals=not options.no_rivals))
    report.write(options.results)


def commands(rounds: int, *, rivals: bool) -> Table:
    timed: dict[str, Callable[[], float]] = {
        "python -c pass": lambda: seconds_of([sys.executable, "-c", "pass"]),
        "import trainfleet (the import alone)": seconds_of_import,
        "trainfleet --help": lambda: seconds_of([str(BIN / "trainfleet"), "--help"]),
    }
    if rivals:
        timed["torchrun --help"] = lambda: seconds_of([str(BIN / "torchrun"), "--help"])
    if rivals and version_of("accelerate"):
        timed["accelerate --help"] = lambda: seconds_of([str(BIN / "accelerate"), "--help"])
    targets = {"import trainfleet (the import alone)": 0.1, "trainfleet --help": 0.4}
    rows = rows_of(take_turns(timed, rounds))
    table = Table(
        title=f"Commands, {rounds} rounds",
        columns=["command", "seconds", "95 % interval", "target"],
        rows=[[*row, f"under {targets[row[0]]} s" if row[0] in targets else None] for row in rows],
    )
    if rivals and not version_of("accelerate"):
        table.rows.append(["accelerate --help", "not installed", None, None])
    return table


def first_steps(rounds: int, nprocs: tuple[int, ...], *, rivals: bool) -> Table:
    timed: dict[str, Callable[[], float]] = {}
    for nproc in nprocs:
        suffix = f", {nproc} process{'es' * (nproc > 1)}"
        timed["trainfleet train" + suffix] = lambda nproc=nproc: first_step_of_recipe(nproc)
        if rivals:
            timed["a plain script, torchrun" + suffix] = lambda nproc=nproc: first_step_of_script(nproc, torchrun=True)
        if nproc == 1:
            timed["a plain script, python" + suffix] = lambda: first_step_of_script(1, torchrun=False)
    return Table(
        title=f"From the command to the end of the first step, {rounds} rounds",
        columns=["command", "seconds", "95 % interval"],
        rows=rows_of(take_turns(timed, rounds)),
        notes=[
            "The recipe is `make train`'s with all that it writes; 2 processes shard by ZeRO-2, and so does the script."
        ],
    )


def take_turns(timed: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in timed}
    for i in range(rounds + 1 if rounds > 1 else 1):
        for name, measure in timed.items():
            seconds = measure()
            if i or rounds == 1:  # the first round of several reads files into memory
                found[name].append(seconds)
    return found


def rows_of(found: dict[str, list[float]]) -> list[list[str | float | None]]:
    rows: list[list[str | float | None]] = []
    for name, seconds in found.items():
        low, high = interval(seconds)
        rows.append([name, statistics.median(seconds), f"{low:.2f} to {high:.2f}"])
    return rows


def seconds_of(command: list[str]) -> float:
    begun = time.perf_counter()
    _run(command)
    return time.perf_counter() - begun


def seconds_of_import() -> float:
    program = "import time; a = time.perf_counter(); import trainfleet; print(time.perf_counter() - a)"
    return float(_run([sys.executable, "-c", program]))


def first_step_of_recipe(nproc: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        begun = time.time()
        settings = ["train.steps=2", f"folder={folder}/run", "data.evaluation=null", "train.evaluate_every=null"]
        settings += ["train.finish=null"]
        _run([str(BIN / "trainfleet"), "train", str(RECIPE), "--nproc", str(nproc), *settings])
        rows = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
        return next(float(row["time"]) for row in rows if row["event"] == "StepEnded") - begun


def first_step_of_script(nproc: int, *, torchrun: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "time"
        command = [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={nproc}"] if torchrun else [sys.executable]
        begun = time.time()
        _run([*command, str(PLAIN), str(answer)])
        return float(answer.read_text()) - begun


def _run(command: list[str]) -> str:
    paths = {**environment(), "PYTHONPATH": str(ROOT / "recipes")}
    done = subprocess.run(command, capture_output=True, text=True, env=paths, cwd=ROOT, timeout=300)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
