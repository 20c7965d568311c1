"""What a step costs in our Trainer, beside a loop written by hand and the loops of others, in one run.

    python benchmarks/step_overhead.py [--quick]

All loops live in the same processes (one thread each), begin with the same numbers, see the same batches, and
take turns: a block of steps each, round after round. A ratio is the median over rounds of block time to that of
the loop by hand in the same round; the loop by hand is also timed against itself, and how far that lies from 1 is
the noise. Ours writes everything a recipe writes by default (lines, metrics.jsonl, TensorBoard, picture), and
every block of ours holds one checkpoint.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from measuring.machine import version_of
from measuring.ranks import run_ranks
from measuring.rounds import interval, ratios, shown
from measuring.table import RESULTS, Report, Table

HAND, AGAIN, OURS = "by hand", "by hand, again", "trainfleet"
SETTINGS: dict[str, dict[str, int]] = {
    "small/1": {"width": 160, "depth": 3, "samples": 4, "length": 256, "block": 50},
    "tiny/1": {"width": 32, "depth": 2, "samples": 2, "length": 64, "block": 100},
    "small/2": {"width": 160, "depth": 3, "samples": 4, "length": 256, "block": 50},
    "tiny/2": {"width": 32, "depth": 2, "samples": 2, "length": 64, "block": 100},
    "zero2/2": {"width": 160, "depth": 3, "samples": 4, "length": 256, "accumulation": 2, "block": 30},
}
"""By name and number of processes. The small one is that of `make train`."""
RIVALS = {"lightning-fabric": "Fabric", "accelerate": "Accelerate", "deepspeed": "DeepSpeed stage 0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and rounds, only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--no-rivals", action="store_true", help="leave the libraries of others out")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", default="", help="only settings whose name contains this, such as tiny/2")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = [name for name in SETTINGS if options.only in name]
    if options.answer:
        on_rank(names, options)
        return
    report = Report(name="step_overhead", summary=__doc__.split("\n\n")[2].replace("\n", " "))
    for nproc in (1, 2):
        if any(name.endswith(f"/{nproc}") for name in names):
            only = options.only if options.only.endswith(f"/{nproc}") else f"{options.only}/{nproc}"
            arguments = ["--only", only, "--rounds", str(options.rounds), *["--quick"] * options.quick]
            arguments += ["--no-rivals"] * options.no_rivals
            for answer in run_ranks(__file__, nproc, arguments):
                report.add(table_of(answer))
    report.write(options.results)


def table_of(answer: dict[str, Any]) -> Table:
    times, cpu, losses = answer["seconds"], answer["cpu_seconds"], answer["losses"]
    noise = shown(interval(ratios(times[AGAIN], times[HAND])))
    rows: list[Sequence[str | float | None]] = []
    for name in times:
        found = ratios(times[name], times[HAND])
        rows.append(
            [
                name,
                statistics.median(times[name]) * 1e3,
                statistics.median(cpu[name]) * 1e3,
                statistics.median(found),
                shown(interval(found)) if name != HAND else "-",
                noise,
                f"{max(abs(a - b) / b for a, b in zip(losses[name], losses[HAND])):.0e}",
            ]
        )
    rows += [[name, "not installed", *[None] * 5] for name in answer["missing"]]
    return Table(
        title=answer["title"],
        columns=[
            "loop",
            "ms a step",
            "ms of processor",
            "ratio to by hand",
            "its 95 % interval",
            "noise: by hand to itself",
            "losses differ by",
        ],
        rows=rows,
        notes=[answer["note"]],
    )


def on_rank(names: Sequence[str], options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from trainfleet import Mesh

    torch.set_num_threads(1)
    with Mesh.from_env(device="cpu") as mesh:
        found = [compare(name, options) for name in names]
        if mesh.is_main:
            options.answer.write_text(json.dumps(found))
        dist.barrier()


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    from loops.setting import Setting

    from trainfleet import Mesh, Plan

    kind, nproc = name.split("/")
    block, rounds = SETTINGS[name]["block"], options.rounds
    setting = Setting(**{key: value for key, value in SETTINGS[name].items() if key != "block"})
    if options.quick:
        setting = replace(setting, width=32, depth=2, samples=1, length=16)
        block, rounds = 4, 2
    plan = Plan(zero=2 if kind == "zero2" else 0)
    mesh = Mesh.from_env(plan, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(mesh.data_axes.exchange(folder)[0])
        makers, missing = loops_for(setting, plan.zero, rivals=not options.no_rivals)
        found = take_turns(setting, makers, plan, mesh, shared, block=block, rounds=rounds)
        mesh.data_axes.barrier()
    parameters = sum(p.numel() for p in setting.build_model().parameters())
    found["title"] = (
        f"{'ZeRO-2' if plan.zero else 'Replicated'}, {nproc} process{'es' * (nproc != '1')}: "
        f"a GPT of {parameters:,} parameters, {setting.accumulation} x {setting.samples} x "
        f"{setting.length} bytes a step and process"
    )
    found["missing"] = missing
    found["note"] = (
        f"{rounds} rounds of {block} steps; AdamW (fused), clipped to norm 1. Ours with lines, JSONL, TensorBoard and "
        f"a checkpoint every {block} steps. Losses: largest relative difference over all {found['steps']} steps."
    )
    return found


def loops_for(setting: Any, zero: int, *, rivals: bool) -> tuple[dict[str, Callable[[Any], Any]], list[str]]:
    """How each loop of others is made from a model; and the names of those that are not installed."""
    from loops.by_hand import ByHand, ByHandSharded

    if zero:
        by_hand: Any = partial(ByHandSharded, accumulation=setting.accumulation)
        makers: dict[str, Any] = {HAND: by_hand, AGAIN: by_hand}
        wanted = {"deepspeed": "DeepSpeed stage 2"}
    else:
        makers, wanted = {HAND: ByHand, AGAIN: ByHand}, RIVALS
    if not rivals:
        return makers, []
    missing = [title for package, title in wanted.items() if version_of(package) is None]
    for package, title in wanted.items():
        if title not in missing:
            makers[title] = rival(package, setting, zero)
    return makers, missing


def rival(package: str, setting: Any, zero: int) -> Any:
    if package == "lightning-fabric":
        from loops.fabric import InFabric

        return InFabric
    if package == "accelerate":
        from loops.accelerate import InAccelerate

        return InAccelerate
    from loops.deepspeed import InDeepSpeed

    return partial(InDeepSpeed, accumulation=setting.accumulation, stage=zero, samples=setting.samples)


def take_turns(
    setting: Any, makers: dict[str, Any], plan: Any, mesh: Any, folder: Path, *, block: int, rounds: int
) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from loops.ours import InTrainer, clocks, elapsed

    ours = InTrainer(setting.build_model(), mesh, plan, folder, accumulation=setting.accumulation, save_every=block)
    loops = {name: make(setting.build_model()) for name, make in makers.items()}
    warm_up = block // 2  # so that ours saves in the middle of its blocks, and all of the save falls into them
    steps = setting.steps(warm_up + rounds * block + 1, mesh.rank)
    timings: dict[str, list[tuple[float, ...]]] = {name: [] for name in loops}
    losses: dict[str, list[float]] = {name: loop.run(steps[:warm_up]) for name, loop in loops.items()}
    at = warm_up

    def others() -> None:
        """A block of each, in another order each round."""
        nonlocal at
        if at == warm_up:
            gc.collect()
            gc.freeze()  # or the collector would walk through what all those libraries brought, now and then
        if at + block > warm_up + rounds * block:
            return
        order = list(loops)
        random.Random(at).shuffle(order)
        for name in order:
            dist.barrier()
            begun = clocks()
            losses[name] += loops[name].run(steps[at : at + block])
            timings[name].append(elapsed(begun))
        at += block
        dist.barrier()

    breaks = [warm_up + i * block for i in range(rounds + 1)]
    timings[OURS] = ours.fit(steps, breaks, others)
    for name, own in losses.items():
        both = torch.tensor(own, dtype=torch.float64)
        dist.all_reduce(both)
        losses[name] = (both / mesh.world_size).tolist()
    losses[OURS] = ours.losses.seen[: len(losses[HAND])]
    return {
        "seconds": {name: [wall / block for wall, _ in blocks] for name, blocks in timings.items()},
        "cpu_seconds": {name: [cpu / block for _, cpu in blocks] for name, blocks in timings.items()},
        "losses": losses,
        "steps": len(losses[HAND]),
    }


if __name__ == "__main__":
    main()
