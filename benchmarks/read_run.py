"""How long it takes to read a run back, and how much memory.

    python benchmarks/read_run.py [--quick]

A metrics.jsonl of so many steps, as a run of today writes them, is read by `read_run`: each in a fresh process, of
which the table has the seconds and the growth of resident memory. Beside it: parsing each line as JSON and nothing
else, and `read_metrics`, which holds all rows at once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring.ranks import environment
from measuring.table import RESULTS, Report, Table

from trainfleet.events import RunStarted, StepEnded
from trainfleet.monitor.jsonl import to_json
from trainfleet.stopwatch import PHASES

WAYS = {
    "json.loads of each line": "[None for line in open(folder + '/metrics.jsonl', 'rb') if not json.loads(line)]",
    "read_run": "read_run(folder)",
    "read_metrics, all rows at once": "read_metrics(folder + '/metrics.jsonl')",
}
PROGRAM = """
import json, resource, sys, time, psutil
from trainfleet.monitor.history import read_run
from trainfleet.monitor.jsonl import read_metrics
folder = sys.argv[1]
before = psutil.Process().memory_info().rss
begun = time.perf_counter()
kept = {way}
seconds = time.perf_counter() - begun
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    options = parser.parse_args()
    table = Table(title="Reading a run back", columns=["steps", "file, MB", "how", "seconds", "memory, MB"], rows=[])
    with tempfile.TemporaryDirectory() as folder:
        for steps in (100, 1000) if options.quick else (10_000, 100_000, 1_000_000):
            size = write(Path(folder), steps)
            for name, way in WAYS.items():
                if steps > 100_000 and name.startswith("read_metrics"):
                    continue  # gigabytes
                seconds, grown = measure(folder, way)
                table.rows.append([f"{steps:,}", size / 1e6, name, seconds, grown / 1e6])
    report = Report(name="read_run", summary=__doc__.split("\n\n")[2].replace("\n", " "))
    report.add(table)
    report.write(options.results)


def write(folder: Path, steps: int) -> int:
    """A run of so many steps; the size of its file."""
    begun = RunStarted(folder="runs/long", steps=steps, start_step=0, world_size=8, parameters=10**9, plan="zero=2")
    with (folder / "metrics.jsonl").open("w") as file:
        file.write(to_json(begun, written_at=1.8e9) + "\n")
        for step in range(1, steps + 1):
            event = StepEnded(
                step=step, loss=2 + 3 / step, learning_rate=3e-4, grad_norm=1.1546784958589462, samples=64,
                tokens=65536, seconds=0.33450267, data_seconds=0.00154565, between_seconds=0.00024,
                phases={phase: 0.03345026 + number / 1000 for number, phase in enumerate(PHASES)},
                waits={"source": 3.5054628e-05, "transform": 0.0013838903, "network": 0.0, "data": 0.0}, mfu=0.41,
                memory_bytes=442_703_872,
            )  # fmt: skip
            file.write(to_json(event, written_at=1.8e9 + step / 3) + "\n")
    return (folder / "metrics.jsonl").stat().st_size


def measure(folder: str, way: str) -> tuple[float, int]:
    command = [sys.executable, "-c", PROGRAM.replace("{way}", way), folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    seconds, grown = json.loads(done.stdout)
    return seconds, grown


if __name__ == "__main__":
    main()
