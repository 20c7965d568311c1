"""The last linear layer and its loss in one, beside the plain form: time, and memory at its most.

    python benchmarks/linear_cross_entropy.py [--quick]

Forward and backward of the loss of N tokens of width D over a vocabulary of V, in float32 on all cores. Time: both take
turns in one process, medians over rounds, and ratios round by round. Memory: a fresh process each, the most that was
resident while it ran, less what was before (hidden states and weights); the gradients of both are in it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measuring.rounds import interval, ratios, shown
from measuring.table import RESULTS, Report, Table
from torch.nn.functional import cross_entropy

from trainfleet.kernels import linear_cross_entropy

SIZES = ((1024, 256, 32_000), (2048, 512, 50_257), (2048, 512, 128_256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(grown_by(options.memory_of[0], *map(int, options.memory_of[1:])))
        return
    report = Report(name="linear_cross_entropy", summary=__doc__.split("\n\n", 2)[2].rstrip())
    sizes = ((64, 32, 1000),) if options.quick else SIZES
    report.add(table_of(sizes, 2 if options.quick else options.rounds))
    report.write(options.results)


def table_of(sizes: tuple[tuple[int, int, int], ...], rounds: int) -> Table:
    rows: list[Sequence[str | float | None]] = []
    for size in sizes:
        seconds = take_turns(steps_of(*size), rounds)
        relative = ratios(seconds["trainfleet"], seconds["plain"])
        for name, values in seconds.items():
            ratio = f"{statistics.median(relative):.3f} ({shown(interval(relative))})" if name == "trainfleet" else None
            memory = memory_of(name, size) / 2**20
            shape = " x ".join(f"{each:,}" for each in size)
            rows.append([shape, name, statistics.median(values), ratio, memory])
    return Table(
        title=f"Forward and backward, {rounds} rounds",
        columns=["N x D x V", "loss", "seconds", "time to plain (95 %)", "MiB at the most"],
        rows=rows,
    )


def steps_of(tokens: int, width: int, vocabulary: int) -> dict[str, Callable[[], None]]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=draw).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=draw) * 0.02).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=draw)

    def plain() -> None:
        hidden.grad = weight.grad = None
        cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()  # type: ignore[no-untyped-call]

    def ours() -> None:
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, targets).total.backward()  # type: ignore[union-attr]

    return {"plain": plain, "trainfleet": ours}


def take_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            if i:
                found[name].append(time.perf_counter() - begun)
    return found


def memory_of(name: str, size: tuple[int, int, int]) -> int:
    command = [sys.executable, __file__, "--memory-of", name, *map(str, size)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


def grown_by(name: str, *size: int) -> int:
    steps_of(8, 8, 8)[name]()  # what torch takes at its first product is no memory of a loss
    step = steps_of(*size)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the most that was resident is counted from here on
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(which: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[which].split()[0]) * 1024


if __name__ == "__main__":
    main()
