"""ZeRO for NumPy over MPI: bytes that each rank holds, beside the formula, and losses beside those of one process.

Bytes are counted where they are allocated (tracemalloc), not where the code says they are: between steps, and at the
most in a step, from which what activations and messages take in stage 0 is known.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
from measuring.mpi import run_under_mpiexec
from measuring.table import RESULTS, Report, Table

TOLERANCE = 0.02
WIDTHS = [64, 500, 500, 10]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--answer", type=Path)
    options = parser.parse_args()
    if options.answer is not None:
        on_rank(options)
        return
    report = Report(name="mpi_zero", summary=str(__doc__))
    alone = run_under_mpiexec(__file__, 1, [])
    for size in (2,) if options.quick else (2, 4):
        report.add(table_of(size, run_under_mpiexec(__file__, size, []), alone["0"]["losses"]))
    report.write(options.results)


def table_of(size: int, found: dict[str, Any], losses: list[float]) -> Table:
    rows: list[list[str | float | None]] = []
    worst = furthest = 0.0
    for stage, each in found.items():
        off = max(abs(held / each["formula"] - 1) for held in each["held"])
        loss_off = float(np.max(np.abs(np.array(each["losses"]) / np.array(losses) - 1)))
        worst, furthest = max(worst, off), max(furthest, loss_off)
        held = f"{min(each['held']) / 1024:,.0f} to {max(each['held']) / 1024:,.0f}"
        peak = f"{max(each['peak']) / 1024:,.0f}"
        rows.append([stage, held, f"{each['formula'] / 1024:,.0f}", f"{off:.1%}", peak, f"{loss_off:.1e}"])
    verdict = f"within {TOLERANCE:.0%}" if worst <= TOLERANCE else f"NOT within {TOLERANCE:.0%}"
    return Table(
        title=f"KiB of each of {size} ranks, an MLP of {num_parameters():,} parameters under AdamW",
        columns=["stage", "held between steps", "formula", "off by", "most in a step", "losses off by"],
        rows=rows,
        notes=[
            f"Every rank is {verdict} of the formula (furthest off: {worst:.1%}).",
            f"Formula: parameters P, in stage 3 the widest band of rows; state 2P, from stage 1 on the widest band. "
            f"Losses of 20 steps, float64, differ from those of one process by {furthest:.1e} at most.",
        ],
    )


def num_parameters() -> int:
    return sum(a * b + b for a, b in itertools.pairwise(WIDTHS))


def formula(stage: int, size: int) -> int:
    """Bytes in float64: parameters and two memories, whole or in bands of rows."""
    band = sum(-(-b // size) * (a + 1) for a, b in itertools.pairwise(WIDTHS))
    whole = num_parameters()
    return 8 * ((band if stage == 3 else whole) + 2 * (band if stage else whole))


def on_rank(options: argparse.Namespace) -> None:
    from trainfleet.mpi import world

    tracemalloc.start()
    answer: dict[str, Any] = {}
    with world() as group:
        train(group, 0)  # what is imported at the first step is no memory of a stage
        for stage in (0, 1, 2, 3) if group.size > 1 else (0,):
            answer[str(stage)] = {**train(group, stage), "formula": formula(stage, group.size)}
        if group.rank == 0:
            options.answer.write_text(json.dumps(answer))


def train(group: Any, stage: int) -> dict[str, Any]:
    """Losses of 20 steps, and the bytes of each rank: between steps, and at the most in the next one."""
    from trainfleet import Plan
    from trainfleet.mpi import AdamW, Mesh, Trainer, cross_entropy, mlp

    # Drawn before anything is counted: a generator holds its last batch, which was 2 % of what a rank of stage 3 holds.
    batches = list(itertools.islice(batches_of(group.rank, group.size), 21))
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    mesh = Mesh(group, Plan(zero=stage))
    model = mlp(WIDTHS, dtype=np.float64)
    trainer = Trainer(model, AdamW(learning_rate=1e-3), cross_entropy, batches, mesh=mesh, micro_batches=2)
    losses = trainer.fit(20)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.reset_peak()
    trainer.fit(21)
    peak = tracemalloc.get_traced_memory()[1] - before
    return {"held": group.exchange(held), "peak": group.exchange(peak), "losses": losses}


def batches_of(rank: int, size: int) -> Any:
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(10, 64))
    while True:
        labels = draw.integers(0, 10, 64)
        images = centres[labels] + draw.normal(size=(64, 64))
        yield images[rank::size], labels[rank::size]


if __name__ == "__main__":
    main()
