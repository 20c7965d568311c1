"""Our ZeRO stages 1 to 3 beside DeepSpeed's: time of a step, and what a rank holds, of the same model.

    python benchmarks/beside_deepspeed.py [--quick]

Two processes of one thread each, in which all loops live together, begin with the same numbers, see the same batches
and take turns: a block of steps each, round after round. A ratio is the median over rounds of block time to that of
DeepSpeed's own loop in the same round; that loop is also timed against itself, which is the noise. DeepSpeed has
torch's optimizer and small buckets, as ours; the third row is DeepSpeed run by plan.engine=deepspeed, which measures
the norm in double precision and divides by tokens. Memory: bytes of live tensors in a third step, as zero_memory.py
counts them, of which the largest moment is shown. The smaller model fits into 25 MiB, so our stages 1 and 2 take it as
one unit, for speed; the larger one is sharded block by block.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from measuring.machine import version_of
from measuring.ranks import run_ranks
from measuring.rounds import interval, ratios, shown
from measuring.table import RESULTS, Report, Table

THEIRS, AGAIN, OURS, WRAPPED = "DeepSpeed", "DeepSpeed, again", "trainfleet", "plan.engine=deepspeed"
ACCUMULATION = 2
SIZES = {
    "small": {"width": 160, "depth": 3, "samples": 4, "length": 256},
    "large": {"width": 384, "depth": 5, "samples": 1, "length": 128},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few steps, only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--no-rivals", action="store_true", help="nothing is left to compare then, so nothing is done")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--size", choices=list(SIZES), help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        on_rank(options)
        return
    if options.no_rivals or version_of("deepspeed") is None:
        sys.exit('DeepSpeed is what this compares with: pip install "trainfleet[deepspeed]".')
    report = Report(name="beside_deepspeed", summary=__doc__.split("\n\n", 2)[2].replace("\n", " ").strip())
    for size in list(SIZES)[: 1 if options.quick else None]:
        answers = []
        for stage in (1, 2, 3):
            arguments = ["--stage", str(stage), "--size", size, "--rounds", str(options.rounds)]
            answers.append(run_ranks(__file__, 2, [*arguments, *["--quick"] * options.quick]))
        report.add(times_of(answers))
        report.add(memory_of(answers))
    report.write(options.results)


def times_of(answers: list[dict[str, Any]]) -> Table:
    rows: list[list[str | float | None]] = []
    for answer in answers:
        times, losses = answer["seconds"], answer["losses"]
        noise = shown(interval(ratios(times[AGAIN], times[THEIRS])))
        for name in (THEIRS, AGAIN, WRAPPED, OURS):
            found = ratios(times[name], times[THEIRS])
            off = max(abs(a - b) / b for a, b in zip(losses[name], losses[THEIRS]))
            spread = shown(interval(found)) if name != THEIRS else "-"
            milliseconds = statistics.median(times[name]) * 1e3
            rows.append(
                [str(answer["stage"]), name, milliseconds, statistics.median(found), spread, noise, f"{off:.0e}"]
            )
    first = answers[0]
    return Table(
        title=f"Time of a step, 2 processes: a GPT of {first['parameters']:,} parameters",
        columns=["stage", "loop", "ms a step", "ratio", "its 95 % interval", "noise", "losses differ by"],
        rows=rows,
        notes=[
            f"{first['rounds']} rounds of {first['block']} steps of {ACCUMULATION} micro-batches; AdamW (fused), "
            "clipped to norm 1."
        ],
    )


def memory_of(answers: list[dict[str, Any]]) -> Table:
    rows: list[list[str | float | None]] = []
    for answer in answers:
        theirs = max(sum(moment.values()) for moment in answer["moments"][THEIRS].values())
        for name in (THEIRS, OURS):
            moments = answer["moments"][name]
            most = max(moments, key=lambda moment: sum(moments[moment].values()))
            held = sum(moments[most].values())
            cells = [held, moments[most]["other"], sum(moments["after the step"].values())]
            rows.append([str(answer["stage"]), name, most, *(f"{cell / 1024:,.0f}" for cell in cells), held / theirs])
    return Table(
        title=f"KiB of rank 0, largest moment and at rest: a GPT of {answers[0]['parameters']:,} parameters",
        columns=["stage", "loop", "moment", "all", "of it other", "after the step", "ratio of all"],
        rows=rows,
        notes=[
            "Other than parameters, gradients and state: activations of one micro-batch, buckets (those of DeepSpeed "
            "have 4 MiB here, and 2 GB by default), and flat copies that a library keeps."
        ],
    )


def on_rank(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    from loops.setting import Setting

    from trainfleet import Mesh

    torch.set_num_threads(1)
    setting = Setting(**SIZES[options.size], accumulation=ACCUMULATION)
    block, rounds = 8 if options.size == "small" else 3, options.rounds
    if options.quick:
        setting = Setting(width=32, depth=2, samples=1, length=16, accumulation=ACCUMULATION)
        block, rounds = 3, 2
    with Mesh.from_env(device="cpu") as mesh:
        found = {"stage": options.stage, "block": block, "rounds": rounds}
        found["parameters"] = sum(p.numel() for p in setting.build_model().parameters())
        found |= take_turns(setting, options.stage, mesh, block=block, rounds=rounds)
        found["moments"] = memory(setting, options.stage, mesh)
        if mesh.is_main:
            options.answer.write_text(json.dumps(found))
        dist.barrier()


def makers(setting: Any, stage: int) -> dict[str, Any]:
    from loops.deepspeed import InDeepSpeed
    from loops.ours import InEngine

    from trainfleet import Plan

    theirs = partial(InDeepSpeed, accumulation=setting.accumulation, stage=stage, samples=setting.samples)
    return {
        THEIRS: theirs,
        AGAIN: theirs,
        OURS: partial(InEngine, plan=Plan(zero=stage)),
        WRAPPED: partial(InEngine, plan=Plan(zero=stage, engine="deepspeed")),
    }


def take_turns(setting: Any, stage: int, mesh: Any, *, block: int, rounds: int) -> dict[str, Any]:
    import time

    import torch
    import torch.distributed as dist

    loops = {name: make(setting.build_model()) for name, make in makers(setting, stage).items()}
    steps = setting.steps((rounds + 1) * block, mesh.rank)
    losses = {name: loop.run(steps[:block]) for name, loop in loops.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    gc.collect()
    gc.freeze()
    for turn in range(1, rounds + 1):
        order = list(loops)
        random.Random(turn).shuffle(order)
        for name in order:
            dist.barrier()
            begun = time.perf_counter()
            losses[name] += loops[name].run(steps[turn * block : (turn + 1) * block])
            dist.barrier()
            seconds[name].append((time.perf_counter() - begun) / block)
    for name, own in losses.items():  # ours are those of all ranks
        both = torch.tensor(own, dtype=torch.float64)
        dist.all_reduce(both)
        losses[name] = (both / mesh.world_size).tolist()
    return {"seconds": seconds, "losses": losses}


def memory(setting: Any, stage: int, mesh: Any) -> dict[str, dict[str, dict[str, int]]]:
    from zero_memory import watch

    made = makers(setting, stage)
    return {name: watch(setting, made[name], mesh.rank) for name in (OURS, THEIRS)}


if __name__ == "__main__":
    main()
