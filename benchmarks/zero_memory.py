"""What each rank holds of parameters, gradients and optimizer state in every stage of ZeRO, beside the formula.

    python benchmarks/zero_memory.py [--quick]

Counted are the bytes of live tensors, not of the process. All is float32; AdamW keeps two moments an element.
With P the bytes of the whole model, N ranks, S = P / N (a shard: rows are dealt out evenly, so the last ranks' are
padded), R what lies outside the blocks, and two micro-batches a step:

    stage   parameters at rest   before the last backward            gradients there   before the update   state
    0       P                    P                                   P                 P                   2 P
    1       S                    P + S   (gathered, and the shard)   P                 S                   2 S
    2       S                    P + S                               S                 S                   2 S
    3       S                    R + S   (blocks are freed again)    S                 S                   2 S
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from measuring.machine import version_of
from measuring.ranks import run_ranks
from measuring.table import RESULTS, Report, Table

REST, MIDDLE, UPDATE = "after the step", "before the last backward", "before the update"
TOLERANCE = 0.03
OURS, DEEPSPEED = "trainfleet", "DeepSpeed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, two ranks only")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--no-rivals", action="store_true", help="leave the libraries of others out")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        on_rank(options)
        return
    report = Report(name="zero_memory", summary=__doc__.split("\n\n", 2)[2].rstrip())
    arguments = ["--quick"] * options.quick + ["--no-rivals"] * options.no_rivals
    for nproc in (2,) if options.quick else (2, 4):
        report.add(table_of(run_ranks(__file__, nproc, arguments), nproc))
    report.write(options.results)


def table_of(answer: dict[str, Any], nproc: int) -> Table:
    rows: list[list[str | float | None]] = []
    worst = 0.0
    for found in answer["found"]:
        for moment, bytes_of in found["moments"].items():
            formula = answer["formulas"][str(found["stage"])][moment]
            columns = [bytes_of[kind] for kind in ("parameters", "gradients", "optimizer state")]
            off = sum(columns) / sum(formula) - 1
            if found["loop"] == OURS:
                worst = max(worst, *(abs(each - true) / max(each, true, 1) for each, true in zip(columns, formula)))
            cells = [_kib(each) for each in (*columns, sum(columns))]
            judged = ["-", "-"] if found["loop"] == DEEPSPEED else [_kib(sum(formula)), f"{off:+.1%}"]
            rows.append([str(found["stage"]), moment, found["loop"], *cells, *judged, _kib(bytes_of["other"])])
    rows += [["1 to 3", "", name, "not installed", *[None] * 6] for name in answer["missing"]]
    verdict = f"within {TOLERANCE:.0%}" if worst <= TOLERANCE else f"NOT within {TOLERANCE:.0%}"
    return Table(
        title=f"KiB of rank 0 of {nproc}, a GPT of {answer['parameters']:,} parameters",
        columns=["stage", "moment", "loop", "parameters", "gradients", "state", "sum", "formula", "off by", "other"],
        rows=rows,
        notes=[
            f"{OURS} is {verdict} of the formula in each kind (furthest off: {worst:.1%}).",
            "Other: activations of one sample, buffers of exchanges under way, and copies that a library keeps "
            "(DeepSpeed's flat partitions). What C++ holds alone is not seen: the buckets of DDP, another P.",
        ],
    )


def _kib(size: int) -> str:
    return f"{size / 1024:,.0f}"


def on_rank(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    from loops.setting import Setting

    from trainfleet import Mesh

    torch.set_num_threads(1)
    # A width that 4 does not divide, so that shards are padded.
    setting = Setting(width=42 if options.quick else 126, depth=4, samples=1, length=4, accumulation=2, heads=1)
    with Mesh.from_env(device="cpu") as mesh:
        makers, missing = loops_for(setting, rivals=not options.no_rivals)
        gc.freeze()  # what libraries brought is not walked through for every figure
        found = []
        for stage, name, make in makers:
            found.append({"stage": stage, "loop": name, "moments": watch(setting, make, mesh.rank)})
        if mesh.is_main:
            model = setting.build_model()
            result = {
                "found": found,
                "missing": missing,
                "parameters": sum(p.numel() for p in model.parameters()),
                "formulas": {stage: formulas(model, stage, mesh.world_size) for stage in range(4)},
            }
            options.answer.write_text(json.dumps(result))
        dist.barrier()


def loops_for(setting: Any, *, rivals: bool) -> tuple[list[tuple[int, str, Callable[[Any], Any]]], list[str]]:
    from loops.by_hand import ByHand, ByHandSharded
    from loops.ours import InEngine

    from trainfleet import Plan

    missing = [] if version_of("deepspeed") or not rivals else [DEEPSPEED]
    makers: list[tuple[int, str, Any]] = [
        (0, OURS, partial(InEngine, plan=Plan(zero=0))),
        (0, "DDP by hand", ByHand),
    ]
    for stage in (1, 2, 3):
        makers.append((stage, OURS, partial(InEngine, plan=Plan(zero=stage))))
        makers.append((stage, "FSDP2 by hand", partial(ByHandSharded, stage=stage)))
        if rivals and not missing:
            from loops.deepspeed import InDeepSpeed

            deepspeed = partial(InDeepSpeed, accumulation=setting.accumulation, stage=stage, samples=setting.samples)
            makers.append((stage, DEEPSPEED, deepspeed))
    return makers, missing


def formulas(model: Any, stage: int, size: int) -> dict[str, tuple[int, int, int]]:
    """Moment -> bytes of parameters, gradients, optimizer state."""
    blocks = {parameter for block in model.blocks for parameter in block.parameters()}
    parameters = list(model.parameters())
    whole = 4 * sum(p.numel() for p in parameters)
    shard = 4 * sum(-(-len(p) // size) * (p.numel() // len(p)) for p in parameters)
    root = 4 * sum(p.numel() for p in parameters if p not in blocks)
    own = shard if stage else whole
    gathered = {0: whole, 1: whole + shard, 2: whole + shard, 3: root + shard}[stage]
    accumulated = whole if stage <= 1 else shard
    state = 2 * own + 4 * len(parameters)  # and a counter of steps a tensor
    return {REST: (own, 0, state), MIDDLE: (gathered, accumulated, state), UPDATE: (own, own, state)}


def watch(setting: Any, make: Callable[[Any], Any], rank: int) -> dict[str, dict[str, int]]:
    """Three steps of a loop; what is held at each moment of the last one."""
    from measuring.held import held, storages
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    before = storages()  # of whatever an earlier loop has not let go
    model = setting.build_model()
    moments: dict[str, dict[str, int]] = {}
    optimizers: list[Any] = []
    forwards = 0

    def look(moment: str) -> None:
        moments[moment] = held(optimizers, before)

    def after_forward(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 3 * setting.accumulation:
            look(MIDDLE)

    def before_update(optimizer: Any, *_: Any) -> None:
        if optimizer not in optimizers:
            optimizers.append(optimizer)  # that of the library, which holds the state
        if forwards == 3 * setting.accumulation:
            look(UPDATE)

    hook = register_optimizer_step_pre_hook(before_update)
    model.register_forward_hook(after_forward)
    loop = make(model)
    loop.run(setting.steps(3, rank))
    look(REST)
    hook.remove()
    return {moment: moments[moment] for moment in (REST, MIDDLE, UPDATE)}


if __name__ == "__main__":
    main()
