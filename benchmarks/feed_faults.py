"""A feeder, the trainer, the relay or the link fails again and again: how soon training goes on, and what it lost.

    python benchmarks/feed_faults.py [--quick] [--faults N] [--tensorflow PYTHON]

A small model is trained over the feed by the Trainer, with a checkpoint every 5 steps. Three feeders make its batches:
one behind a link that is cut, goes half open or stands still; one beside it; one behind a relay. In turn something gets
SIGKILL or breaks, at a random moment, and is mended within 0.3 seconds. Beside it the peer that is often written by
hand, under the same faults: a DataLoader whose batches are pickled to whoever has connected. Samples count as lost or
doubled where they were used less or more than once an epoch in the steps that the final weights are made of. Of
tf.data service, by an interpreter that has tensorflow, only workers are killed, as often as feeders are of ours: its
consumer just iterates, and nothing else fails.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from faults.parts import SAMPLES
from faults.running import KINDS, Outcome, run_with_faults
from faults.service import serve_with_kills
from measuring.table import RESULTS, Report, Table

OURS, PEER = "trainfleet", "DataLoader over a socket"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one fault of each kind, only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--tensorflow", metavar="PYTHON", help="an interpreter that has tensorflow or tensorflow-cpu")
    options = parser.parse_args()
    faults = len(KINDS) if options.quick else options.faults
    outcomes = {name: broken_often(faults, peer=name == PEER) for name in (OURS, PEER)}
    report = Report(name="feed_faults", summary=__doc__.split("\n\n")[2].replace("\n", " "))
    report.add(what_was_lost(outcomes))
    report.add(how_soon(outcomes))
    if options.tensorflow:
        report.add(of_a_service(options.tensorflow, kills=max(1, faults // len(KINDS))))
    report.write(options.results)


def broken_often(faults: int, *, peer: bool) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="trainfleet-bench-") as place:
        return run_with_faults(Path(place), faults=faults, seed=0, peer=peer)


def what_was_lost(outcomes: dict[str, Outcome]) -> Table:
    rows = [
        [
            name,
            str(outcome.faults.total()),
            str(outcome.steps),
            str(outcome.lost),
            str(outcome.doubled),
            "yes" if outcome.same_weights else "no",
        ]
        for name, outcome in outcomes.items()
    ]
    return Table(
        title="What was lost",
        columns=["run", "faults", "steps", "samples lost", "samples doubled", "weights of the run without faults"],
        rows=rows,
        notes=["The weights are compared to the bit."],
    )


def of_a_service(python: str, *, kills: int) -> Table:
    policies = {"DYNAMIC, 3 workers": ("DYNAMIC", 3), "OFF, 1 worker": ("OFF", 1)}
    rows: list[list[str | float | None]] = []
    version = ""
    for name, (policy, workers) in policies.items():
        for number in (0, kills):
            served = serve_with_kills(python, policy, workers=workers, kills=number, seed=0)
            end = "hung" if served.hung else "whole"
            rows.append([name, str(number), str(served.epochs), str(served.lost), str(served.doubled), end])
            version = served.version
    return Table(
        title="tf.data service, whose workers are killed",
        columns=["sharding policy", "workers killed", "epochs", "samples lost", "samples doubled", "end"],
        rows=rows,
        notes=[
            f"{SAMPLES} samples an epoch; tensorflow {version}. By its documentation DYNAMIC gives a sample at most "
            "once, and OFF lets every worker make the whole epoch. A kill comes 10 to 60 samples after all workers are "
            "there."
        ],
    )


def how_soon(outcomes: dict[str, Outcome]) -> Table:
    rows: list[list[str | float | None]] = []
    for name, outcome in outcomes.items():
        for kind in KINDS:
            seconds = [each for of, each in outcome.resumed if of == kind]
            if seconds:
                rows.append([name, kind.replace("_", " "), str(len(seconds)), statistics.median(seconds), max(seconds)])
    return Table(
        title="Seconds from a fault to the next step",
        columns=["run", "what failed", "times", "median", "longest"],
        rows=rows,
        notes=[
            "With the time in which it was not mended yet, 0.15 s on average. A killed trainer starts its process "
            "again, imports nothing, and goes on from its newest checkpoint."
        ],
    )


if __name__ == "__main__":
    main()
