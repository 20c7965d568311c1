"""The bubble of every schedule of a pipeline beside the formula.

    python benchmarks/pipeline_bubble.py [--quick]

Two ranks of one thread each hold equal stages of a model of equal blocks. Measured is how long a rank waits for the
other, as a share of the schedule's time, mean over both ranks: what messages cost is in it. Formula: (p-1)/(m+p-1) for
p ranks and m micro-batches, and (p-1)/(vm+p-1) where each rank holds v stages; zero-bubble schedules aim at 0, where
the two parts of backward take as long as forward. Schedules take turns, round by round; figures are medians
over rounds, with an interval of 95 % for the measured share.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring.ranks import run_ranks
from measuring.rounds import interval, shown
from measuring.table import RESULTS, Report, Table

RANKS = 2
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev")
PLAIN = ("gpipe", "1f1b")
TO_ZERO = ("interleaved_zero_bubble", "zbv", "dualpipev")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--micro-batches", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    if options.answer:
        found = measured(options.micro_batches, rounds, width=32 if options.quick else 512)
        if found is not None:
            options.answer.write_text(json.dumps(found))
        return
    report = Report(name="pipeline_bubble", summary=(__doc__ or "").split("\n\n", 2)[2].rstrip())
    for count in (4,) if options.quick else (4, 8, 16):
        arguments = ["--rounds", str(rounds), "--micro-batches", str(count), *["--quick"] * options.quick]
        report.add(table_of(run_ranks(__file__, RANKS, arguments), count, rounds))
    report.write(options.results)


def table_of(found: dict[str, Any], count: int, rounds: int) -> Table:
    rows: list[Sequence[str | float | None]] = []
    for schedule in SCHEDULES:
        shares, seconds = found[schedule]["shares"], found[schedule]["seconds"]
        bubble = 0.0 if schedule in TO_ZERO else formula(count, 1 if schedule in PLAIN else 2)
        measured_share = f"{statistics.median(shares):.3f} ({shown(interval(shares))})"
        rows.append([schedule, bubble, measured_share, statistics.median(seconds)])
    return Table(
        title=f"{RANKS} ranks, {count} micro-batches, {rounds} rounds",
        columns=["schedule", "formula", "measured (95 %)", "seconds a step"],
        rows=rows,
    )


def formula(count: int, stages_per_rank: int) -> float:
    return (RANKS - 1) / (stages_per_rank * count + RANKS - 1)


def measured(count: int, rounds: int, *, width: int) -> dict[str, Any] | None:
    """By schedule, the share of waiting and the seconds of each round; on rank 0."""
    import torch
    from torch import Tensor, nn

    from trainfleet.mesh import Mesh
    from trainfleet.parallel import parallelize
    from trainfleet.parallel.pipeline.engine import PipelineEngine
    from trainfleet.plan import Plan
    from trainfleet.stopwatch import Stopwatch

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x))) + x  # type: ignore[no-any-return]

    torch.set_num_threads(1)
    torch.manual_seed(0)  # both ranks get the same model and data
    batches = [torch.randn(32, width) for _ in range(count)]
    plans = {schedule: Plan(pp=RANKS, schedule=schedule) for schedule in SCHEDULES}  # type: ignore[arg-type]
    with Mesh.from_env(plans["gpipe"], device="cpu") as mesh:
        engines = {}
        for schedule, plan in plans.items():
            model = parallelize(nn.Sequential(*(Block() for _ in range(8))), mesh, plan, example=batches[0])
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            engines[schedule] = PipelineEngine(model, optimizer, lambda output, _: output.square().mean())
        found: dict[str, Any] = {schedule: {"shares": [], "seconds": []} for schedule in SCHEDULES}
        for i in range(rounds + 1):
            for schedule, engine in engines.items():
                mesh.world.barrier()
                with Stopwatch() as watch:
                    engine.forward_backward(batches)
                    phases = watch.take()
                    engine.step()
                    seconds = sum(phases.values()) + sum(watch.take().values())
                shares = mesh.world.exchange(phases["communication"] / sum(phases.values()))
                if i:
                    found[schedule]["shares"].append(statistics.mean(shares))
                    found[schedule]["seconds"].append(seconds)
        return found if mesh.is_main else None


if __name__ == "__main__":
    main()
