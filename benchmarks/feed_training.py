"""The same training on data of its own and fed: samples per second, and how long the trainer waits for data.

    python benchmarks/feed_training.py [--quick]

Pictures cost one core to make (uint8, cropped, turned, with noise), and a small convolutional net costs the other to
train. In every run the trainer is bound to one core, and whoever makes its batches to the other: locally a worker
process, else a feeder with one worker. `one host` passes batches by shared memory; between hosts, which are network
namespaces joined by a cable of that rate, they go by TLS with a token. All runs are open during the whole time and
take turns, in another order each round; up to 4 batches wait ahead in each, and the first 8 steps of a block are not
timed. At the end all have the same weights, to the bit. `local, again` is the noise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from feeds.training import SIDE, SIZE
from measuring.hosts import ADDRESSES, Hosts
from measuring.rounds import interval, ratios
from measuring.table import RESULTS, Report, Table

LOCAL = "local"
RATES = {"two hosts, 1 Gbit/s": "1gbit", "two hosts, 100 Mbit/s": "100mbit"}
TARGET = 0.97
ENOUGH_SECONDS = 120.0


class Side:
    """A feeder or a trainer in a process of its own, spoken to by lines."""

    def __init__(self, prefix: Sequence[str], *arguments: str) -> None:
        command = [*prefix, sys.executable, "-m", "feeds.training", *arguments]
        folder = Path(__file__).parent
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended with {self._process.wait(ENOUGH_SECONDS)}.")
        found: dict[str, Any] = json.loads(line)
        return found

    def tell(self, words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and rounds, only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=30, help="of each block, beside 8 that are not timed")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 2, 4
    report = Report(name="feed_training", summary=" ".join(__doc__.split("\n\n", 2)[2].split()))
    with ExitStack() as opened:
        trainers, missing = open_all(opened)
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in trainers}
        for number in range(options.rounds):
            for name in random.Random(number).sample(list(trainers), len(trainers)):
                trainers[name].tell(str(options.steps))
                answers[name].append(trainers[name].hear())
    report.add(table_of(answers, missing, options))
    report.write(options.results)


def open_all(opened: ExitStack) -> tuple[dict[str, Side], dict[str, str]]:
    """Trainers that are ready, and why others cannot be."""

    def side(prefix: Sequence[str], *arguments: str) -> Side:
        made = Side(prefix, *arguments)
        opened.callback(made.close)
        return made

    trainers = {name: side([], "train") for name in (LOCAL, "local, again")}
    missing: dict[str, str] = {}
    feeder = side([], "feed", "127.0.0.1:0")
    trainers["one host"] = side([], "train", feeder.hear()["place"])
    for name, rate in RATES.items():
        try:
            hosts = Hosts(rate)
        except OSError as exc:
            missing[name] = str(exc)
            continue
        opened.callback(hosts.close)
        feeder = side(hosts.prefix(0), "feed", f"{ADDRESSES[0]}:7700")
        trainers[name] = side(hosts.prefix(1), "train", feeder.hear()["place"])
    for trainer in trainers.values():
        trainer.hear()
    return trainers, missing


def table_of(answers: dict[str, list[dict[str, Any]]], missing: dict[str, str], options: argparse.Namespace) -> Table:
    speeds = {name: [answer["samples_per_second"] for answer in given] for name, given in answers.items()}
    rows: list[Sequence[str | float | None]] = []
    for name, given in answers.items():
        of_local = ratios(speeds[name], speeds[LOCAL])
        low, high = interval(of_local)
        rows.append(
            [
                name,
                f"{statistics.median(speeds[name]):.0f}",
                f"{statistics.median(of_local):.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{statistics.median(answer['idle'] for answer in given):.1%}",
                said(given),
            ]
        )
    rows += [[name, "not possible here", *[None] * 3, reason] for name, reason in missing.items()]
    weights = {answer["weights"] for given in answers.values() for answer in given[-1:]}
    return Table(
        title=f"{options.rounds} rounds of {options.steps} steps with {SIZE} pictures of 3 x {SIDE} x {SIDE}",
        columns=["run", "samples/s", "of local", "95 %", "the trainer waits", "for what, as the view says"],
        rows=rows,
        notes=[
            f"A batch is {SIZE * 3 * SIDE * SIDE / 1e6:.2f} MB. "
            + ("All weights are the same, to the bit. " if len(weights) == 1 else "THE WEIGHTS DIFFER. ")
            + marks(speeds)
        ],
    )


def said(given: list[dict[str, Any]]) -> str:
    """The causes that the trainer's live view adds up, in percent of its waits."""
    causes = Counter[str]()
    for answer in given:
        causes.update(answer["causes"])
    whole = causes.total()
    if statistics.median(answer["idle"] for answer in given) < 0.01 or not whole:
        return "nothing"
    return ", ".join(
        f"{cause} {seconds / whole:.0%}" for cause, seconds in causes.most_common() if seconds > 0.01 * whole
    )


def marks(speeds: dict[str, list[float]]) -> str:
    """What was to be reached where the link is not the limit, and what was."""
    found = []
    for name in ("one host", "two hosts, 1 Gbit/s"):
        if name in speeds:
            ratio = statistics.median(ratios(speeds[name], speeds[LOCAL]))
            found.append(
                f"{name}: {ratio:.3f} of local (at least {TARGET}: {'holds' if ratio >= TARGET else 'MISSED'})."
            )
    return " ".join(found)


if __name__ == "__main__":
    main()
