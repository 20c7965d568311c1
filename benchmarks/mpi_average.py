"""Averaging gradients over MPI: beside raw Allreduce, tensor by tensor, and how much hides behind computing.

Large: a few tensors of 16 MB, beside mpi4py's Allreduce, which sums in place and does not divide. Small: thousands of
1 KB, beside averaging tensor by tensor: by the same function, with the same promises (deadlines, unlike ranks named);
by mpi4py's allreduce of objects, as a first script does it; and by its Allreduce of buffers. Contenders take turns in
every round; the time of a call is that of the slowest rank. Overlap is the part of the averaging that costs no time
when matrices are multiplied between the additions of gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring.mpi import run_under_mpiexec
from measuring.rounds import interval, ratios, shown
from measuring.table import RESULTS, Report, Table

RAW, AGAIN, OURS = "raw Allreduce", "raw Allreduce, again", "average_gradients"
EACH, EACH_RAW = "average_gradients, each tensor", "raw Allreduce and division, each tensor"
EACH_OBJECT = "comm.allreduce and division, each tensor"
TARGETS = {"large": 0.9, "small": 5.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--answer", type=Path)
    options = parser.parse_args()
    if options.answer is not None:
        on_rank(options)
        return
    report = Report(name="mpi_average", summary=str(__doc__))
    for size in (2,) if options.quick else (2, 4):
        answer = run_under_mpiexec(__file__, size, ["--quick"] * options.quick)
        for kind in ("large", "small"):
            report.add(table_of(kind, size, answer))
        report.add(overlap_of(size, answer["overlap"]))
    report.write(options.results)


def table_of(kind: str, size: int, answer: dict[str, Any]) -> Table:
    times, num_bytes, count = (answer[kind][each] for each in ("seconds", "bytes", "count"))
    reference = RAW if kind == "large" else EACH
    rows: list[list[str | float | None]] = []
    for name, seconds in times.items():
        faster = [1 / ratio for ratio in ratios(seconds, times[reference])]
        middle = statistics.median(seconds)
        rows.append([name, middle * 1e3, num_bytes / middle / 1e9, statistics.median(faster), shown(interval(faster))])
    found = next(row[3] for row in rows if row[0] == OURS)
    verdict = "reached" if float(found or 0) >= TARGETS[kind] else "NOT reached"
    notes = [f"{OURS}: {found:.2f} times the speed of {reference}; at least {TARGETS[kind]:g} is asked for: {verdict}."]
    if kind == "small":
        for rival in (EACH_OBJECT, EACH_RAW):
            faster = statistics.median(1 / ratio for ratio in ratios(times[OURS], times[rival]))
            notes.append(f"{OURS}: {faster:.2f} times the speed of {rival}.")
        notes.append("Raw Allreduce takes the small tensors as one array that lies ready, and does not divide.")
    return Table(
        title=f"{count:,} {kind} tensors of {num_bytes / count / 1e3:,.0f} KB, {size} ranks",
        columns=["what", "ms", "GB/s", f"speed / {reference}", "95 % interval"],
        rows=rows,
        notes=notes,
    )


def overlap_of(size: int, found: dict[str, list[float]]) -> Table:
    middle = {name: statistics.median(seconds) for name, seconds in found.items()}
    hidden = (middle["computing"] + middle["averaging"] - middle["both"]) / middle["averaging"]
    return Table(
        title=f"Overlap with matrix products, {size} ranks",
        columns=["what", "ms"],
        rows=[[name, seconds * 1e3] for name, seconds in middle.items()],
        notes=[
            f"{hidden:.0%} of the averaging is hidden. MPI moves on a CPU's core: where ranks fill the cores, there "
            "is none left to hide it on, and MPI carries on only while somebody calls it."
        ],
    )


def on_rank(options: argparse.Namespace) -> None:
    from mpi4py import MPI

    from trainfleet.comm.mpi_group import MpiGroup
    from trainfleet.mpi import average_gradients

    comm, group = MPI.COMM_WORLD, MpiGroup.world()
    rounds = 5 if options.quick else 15
    answer: dict[str, Any] = {}
    for kind, count, length in (("large", 4, 4 << 20), ("small", 2000, 256)):
        count, length = (count, length // 8) if options.quick else (count, length)
        gradients = [np.full(length, comm.rank, np.float32) for _ in range(count)]
        joined = np.concatenate(gradients)

        def raw(gradients: Any = gradients, joined: Any = joined, kind: str = kind) -> None:
            for each in gradients if kind == "large" else [joined]:
                comm.Allreduce(MPI.IN_PLACE, each)

        def each_raw(gradients: Any = gradients) -> None:
            for each in gradients:
                comm.Allreduce(MPI.IN_PLACE, each)
                np.divide(each, comm.size, out=each)

        def each_object(gradients: Any = gradients) -> None:
            for each in gradients:
                comm.allreduce(each) / comm.size

        def each_of_ours(gradients: Any = gradients) -> None:
            for each in gradients:
                average_gradients([each], group)

        def ours(gradients: Any = gradients) -> None:
            average_gradients(gradients, group)

        contenders = {RAW: raw, OURS: ours, EACH_RAW: each_raw}
        if kind == "small":
            contenders |= {EACH_OBJECT: each_object, EACH: each_of_ours}
        contenders[AGAIN] = raw
        seconds = timed(comm, contenders, rounds, reset=[*gradients, joined])
        answer[kind] = {"seconds": seconds, "bytes": 4 * count * length, "count": count}
    answer["overlap"] = overlap(comm, group, rounds)
    if comm.rank == 0:
        options.answer.write_text(json.dumps(answer))


def timed(
    comm: Any, contenders: dict[str, Callable[[], None]], rounds: int, reset: list[Any]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):  # two to warm up
        for name, call in contenders.items():
            for array in reset:
                array.fill(1.0)
            comm.Barrier()
            began = time.perf_counter()
            call()
            slowest = max(comm.allgather(time.perf_counter() - began))
            if number >= 2:
                found[name].append(slowest)
    return found


def overlap(comm: Any, group: Any, rounds: int) -> dict[str, list[float]]:
    """Eight layers: a product of matrices each, after which its gradient of 4 MB is there."""
    from trainfleet.mpi import GradientAverage

    gradients = [np.ones(1 << 20, np.float32) for _ in range(8)]
    matrix = np.ones((700, 700), np.float32)

    def computing() -> None:
        for _ in gradients:
            matrix @ matrix

    def averaging() -> None:
        average = GradientAverage(group)
        for number, gradient in enumerate(gradients):
            average.add(number, gradient)
        average.finish()

    def both() -> None:
        average = GradientAverage(group)
        for number, gradient in enumerate(gradients):
            matrix @ matrix
            average.add(number, gradient)
        average.finish()

    return timed(comm, {"computing": computing, "averaging": averaging, "both": both}, rounds, gradients)


if __name__ == "__main__":
    main()
