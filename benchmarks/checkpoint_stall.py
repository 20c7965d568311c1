"""What a checkpoint costs the loop, and how soon it stands, beside torch's own and a plain write of the same bytes.

    python benchmarks/checkpoint_stall.py [--quick]

One GPT is trained by ZeRO-2 on 2 processes (one thread each), and everybody saves the same model and AdamW state from
it, in turns and in another order each round. Ordinary steps are timed, then one at whose end a save is begun, then
those until it is committed. Apart from that each saves once while the loop waits: that is the time to commit. All keep
the memory that they copy into, and all fsync. DCP is torch.distributed.checkpoint, async in a thread or in a process
(its copy then lies in shared memory). The plain write is each rank's bytes, in one file, with one fsync, from memory.
The plain copy is that of the same tensors into memory that was got and touched before, tensor by tensor.

The loop is measured twice: with the C library as it is, and with GLIBC_TUNABLES set so that it copies a megabyte and
more past the caches. What is loaded again is in the page cache for all; ours compares every byte with its digest.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import psutil
from measuring.ranks import run_ranks
from measuring.rounds import interval, ratios
from measuring.table import RESULTS, Report, Table

RAW, SYNC, THREAD, PROCESS, OURS = "plain write", "DCP sync", "DCP async, thread", "DCP async, process", "trainfleet"
COPY = "a plain copy of the same bytes"
PAST_CACHES = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=1048576"}
BLOCKED_TARGET, COMMITTED_TARGET = 1 / 3, 1.5
ORDINARY = 3
"""Ordinary steps before each save, whose median is what the save-step is compared with."""
AFTER = 4
"""Steps after it, in which all have committed."""

Turn: TypeAlias = dict[str, float]
"""Seconds: `ordinary`, `save_step`, `call`, `lost`, `commit`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--no-rivals", action="store_true", help="leave torch's checkpoints out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--brief", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        on_rank(options)
        return
    report = Report(name="checkpoint_stall", summary=" ".join(__doc__.split("\n\n", 2)[2].split()))
    arguments = ["--rounds", str(2 if options.quick else options.rounds)]
    arguments += ["--quick"] * options.quick + ["--no-rivals"] * options.no_rivals
    usual = run_ranks(__file__, 2, arguments)
    past = run_ranks(__file__, 2, [*arguments, "--brief"], also=PAST_CACHES)
    report.add(blocked_table(usual, "the C library as it is"))
    report.add(blocked_table(past, "large copies past the caches"))
    report.add(committed_table(usual))
    report.add(restored_table(usual))
    report.write(options.results)


def blocked_table(answer: dict[str, Any], how: str) -> Table:
    turns = answer["turns"]
    asynchronous = [name for name in (THREAD, PROCESS) if name in turns]
    rows: list[Sequence[str | float | None]] = [[COPY, None, None, *_ms(answer["copies"]), None, None, None]]
    for name in turns:
        stall = [turn["save_step"] - turn["ordinary"] for turn in turns[name]]
        lost = [turn["lost"] for turn in turns[name]]
        call = [turn["call"] for turn in turns[name]]
        held = answer["held"].get(name)
        rows.append([name, *_ms(stall), *_ms(call), *_ms(lost), None if held is None else f"{held / 1e6:,.0f}"])
    notes = [
        f"Blocked: the step with the save less the median of the {ORDINARY} ordinary ones before it; the call: the "
        "time within the call that saves, with what it takes to gather the state. Lost in all: the steps from the "
        f"save to its commit, less as many ordinary ones (of {answer['step'] * 1e3:.0f} ms). Rank 0, "
        "medians over rounds and where they lie in 95 of 100 cases.",
        "Held: what the 2 ranks and the processes they started have in memory between saves and had not before the "
        "first, shared pages counted once (PSS).",
    ]
    if asynchronous:
        best = min(asynchronous, key=lambda name: statistics.median(turn["call"] for turn in turns[name]))
        calls = {name: statistics.median(turn["call"] for turn in turns[name]) for name in (OURS, best)}
        floor = statistics.median(answer["copies"])
        notes.append(
            f"The call of trainfleet takes {calls[OURS] / calls[best]:.2f} times as long as that of {best}, the "
            f"quicker one (target: at most {BLOCKED_TARGET:.2f}); a plain copy alone would take "
            f"{floor / calls[best]:.2f} times as long. What trainfleet adds to the copy is "
            f"{(calls[OURS] - floor) / (calls[best] - floor):.2f} of what {best} adds."
        )
    return Table(
        title=f"The loop, {how}: {answer['bytes'] / 1e6:,.0f} MB over 2 ranks, {answer['rounds']} rounds",
        columns=["saved by", "blocked, ms", "95 %", "the call, ms", "95 %", "lost in all, ms", "95 %", "held, MB"],
        rows=rows,
        notes=notes,
    )


def committed_table(answer: dict[str, Any]) -> Table:
    commits = answer["commits"]
    rows: list[Sequence[str | float | None]] = []
    for name, seconds in commits.items():
        found = ratios(seconds, commits[RAW])
        low, high = interval(found)
        of_raw = [statistics.median(found), f"{low:.2f} to {high:.2f}"] if name != RAW else [1.0, "-"]
        while_training = [turn["commit"] for turn in answer["turns"].get(name, [])]
        rows.append([name, *_ms(seconds), *of_raw, *(_ms(while_training) if while_training else [None, None])])
    ratio = statistics.median(ratios(commits[OURS], commits[RAW]))
    return Table(
        title=f"To the commit, {answer['bytes'] / 1e6:,.0f} MB over 2 ranks, {answer['rounds']} rounds",
        columns=["saved by", "commit, ms", "95 %", "of the plain write", "95 %", "commit while training, ms", "95 %"],
        rows=rows,
        notes=[
            "From the call until the checkpoint stands, with digests (only ours has any) and fsyncs, while the loop "
            f"waits. trainfleet: {ratio:.2f} of the plain write (target: at most {COMMITTED_TARGET}). "
            "While training: the same with steps going on, in which all cores are busy."
        ],
    )


def restored_table(answer: dict[str, Any]) -> Table:
    restores = answer["restores"]
    rows: list[Sequence[str | float | None]] = []
    for name, seconds in restores.items():
        found = ratios(seconds, restores[SYNC]) if SYNC in restores else None
        low, high = interval(found) if found else (0.0, 0.0)
        of_load = [statistics.median(found), f"{low:.2f} to {high:.2f}"] if found else [None, None]
        rows.append([name, *_ms(seconds), *of_load])
    return Table(
        title=f"Back into the same 2 ranks, {answer['bytes'] / 1e6:,.0f} MB, {answer['rounds']} rounds",
        columns=["restored by", "ms", "95 %", "of DCP load", "95 %"],
        rows=rows,
        notes=[
            "Rank 0, until all ranks have it. trainfleet verifies every byte before it touches a state; DCP nothing."
        ],
    )


def _ms(seconds: Sequence[float]) -> list[str]:
    low, high = interval(seconds)
    return [f"{statistics.median(seconds) * 1e3:.1f}", f"{low * 1e3:.1f} to {high * 1e3:.1f}"]


# on each rank


def on_rank(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    from loops.ours import InEngine
    from loops.savers import bytes_of, makers_for, tensors_of
    from loops.setting import Setting

    from trainfleet import Mesh, Plan

    torch.set_num_threads(1)
    width, depth = (64, 2) if options.quick else (512, 6)
    setting = Setting(width=width, depth=depth, samples=1, length=32)
    with Mesh.from_env(device="cpu") as mesh, tempfile.TemporaryDirectory(dir=options.answer.parent) as folder:
        loop = InEngine(setting.build_model(), Plan(zero=2))
        step = setting.steps(1, mesh.rank)
        loop.run(step)  # from here on there is an optimizer state
        num_bytes = sum(mesh.data_axes.exchange(bytes_of(loop)))
        shared = Path(mesh.data_axes.exchange(folder)[0])
        makers = makers_for(loop, mesh, shared, rivals=not options.no_rivals)
        if options.brief:
            makers = {name: maker for name, maker in makers.items() if name in (OURS, RAW, THREAD)}
        found = measure(makers, tensors_of(loop), lambda: loop.run(step), mesh, options.rounds)
        if mesh.is_main:
            options.answer.write_text(json.dumps({**found, "rounds": options.rounds, "bytes": num_bytes}))
        dist.barrier()


def measure(
    makers: dict[str, Callable[[], Any]], tensors: list[Any], step: Callable[[], object], mesh: Any, rounds: int
) -> dict[str, Any]:
    from loops.savers import copier

    savers: dict[str, Any] = {}
    held = {}
    for name, make in makers.items():
        before = memory_of_all(mesh)
        savers[name] = make()
        for _ in range(2):  # the first gets memory and starts processes
            savers[name].begin()()
            savers[name].tidy(mesh)
        held[name] = memory_of_all(mesh) - before
    gc.collect()
    gc.freeze()
    copy = copier(tensors)
    copies = []
    commits: dict[str, list[float]] = {name: [] for name in savers}
    turns: dict[str, list[Turn]] = {name: [] for name in savers}
    for number in range(rounds):
        mesh.data_axes.barrier()
        begun = time.perf_counter()
        copy()
        copies.append(time.perf_counter() - begun)
        order = list(savers)
        random.Random(number).shuffle(order)
        for name in order:
            commits[name].append(one_commit(savers[name], mesh))
            if name != RAW:
                turns[name].append(one_turn(savers[name], step, mesh))
    restores = measure_restores(savers, mesh, rounds)
    for saver in savers.values():
        saver.close()
    del turns[RAW], held[RAW]
    steps = [turn["ordinary"] for name in turns for turn in turns[name]]
    return {
        "copies": copies,
        "commits": commits,
        "turns": turns,
        "held": held,
        "restores": restores,
        "step": statistics.median(steps),
    }


def measure_restores(savers: dict[str, Any], mesh: Any, rounds: int) -> dict[str, list[float]]:
    """Seconds to load what was saved last, by those that can; once before, so that it is in the page cache."""
    able = {name: saver for name, saver in savers.items() if saver.restore is not None}
    for saver in able.values():
        saver.begin()()
        mesh.data_axes.barrier()
        saver.restore()
    seconds: dict[str, list[float]] = {name: [] for name in able}
    for number in range(rounds):
        for name in random.Random(number).sample(list(able), len(able)):
            mesh.data_axes.barrier()
            begun = time.perf_counter()
            able[name].restore()
            mesh.data_axes.barrier()
            seconds[name].append(time.perf_counter() - begun)
    for saver in able.values():
        saver.tidy(mesh)
    return seconds


def one_commit(saver: Any, mesh: Any) -> float:
    """Seconds from the call until it stands, for the slowest rank; the loop waits."""
    mesh.data_axes.barrier()
    begun = time.perf_counter()
    saver.begin()()
    seconds = time.perf_counter() - begun
    saver.tidy(mesh)
    return max(float(other) for other in mesh.data_axes.exchange(seconds))


def one_turn(saver: Any, step: Callable[[], object], mesh: Any) -> Turn:
    """Ordinary steps, one with a save, and those in which it is committed."""
    ordinary = []
    for _ in range(ORDINARY):
        begun = time.perf_counter()
        step()
        ordinary.append(time.perf_counter() - begun)
    usual = statistics.median(ordinary)
    begun = time.perf_counter()
    step()
    called = time.perf_counter()
    wait = saver.begin()
    returned = time.perf_counter()
    committed: list[float] = []

    def watch() -> None:
        wait()
        committed.append(time.perf_counter() - called)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(AFTER):
        step()
    ended = time.perf_counter()
    watcher.join(timeout=120)
    saver.tidy(mesh)
    return {
        "ordinary": usual,
        "save_step": returned - begun,
        "call": returned - called,
        "lost": ended - begun - (1 + AFTER) * usual,
        "commit": committed[0],
    }


def memory_of_all(mesh: Any) -> int:
    """Bytes of all ranks and of the processes that they started; what several share is counted once."""
    gc.collect()
    process = psutil.Process()
    own = sum(each.memory_full_info().pss for each in (process, *process.children(recursive=True)))
    return sum(int(other) for other in mesh.data_axes.exchange(own))


if __name__ == "__main__":
    main()
