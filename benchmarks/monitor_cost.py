"""What it costs to see a run: a step with everything switched on beside one with everything off, and events a second.

    python benchmarks/monitor_cost.py [--quick]

The recipe of `make train` (recipes/gpt_stdlib.yaml), on one and on two processes of one thread each, by the Trainer,
without evaluations and checkpoints. Three runs live in the same processes and take turns, a block of steps each, round
after round: one with all that sees (console lines, metrics.jsonl, metrics.csv, TensorBoard, the picture, MFU, the
phases of each step, the reports of the ranks, and whatever else the recipe's section monitor has by default); one with
nothing of it, not even a stopwatch; and that one again, which shows the noise. A ratio is the median over rounds, with
the interval in which it lies in 95 of 100 cases. The first steps, with the MFU's count and imports, are not in it.

Then each observer alone is told of steps as fast as it takes them, until it is closed; beside it what others bring for
the same numbers, where it is installed.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from measuring.machine import version_of
from measuring.ranks import ROOT, run_ranks
from measuring.rounds import interval, ratios, shown
from measuring.table import RESULTS, Report, Table

OFF, AGAIN, ON = "off", "off, again", "on"
WARM_UP = 12  # more than log_interval, so that the MFU is known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--block", type=int, default=20, help="steps of a turn")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.block = 2, 4
    if options.answer:
        on_rank(options)
        return
    report = Report(name="monitor_cost", summary=(__doc__ or "").split("\n\n", 2)[2].rstrip())
    arguments = ["--rounds", str(options.rounds), "--block", str(options.block), *["--quick"] * options.quick]
    found = [run_ranks(__file__, nproc, arguments, timeout_seconds=3000) for nproc in (1, 2)]
    report.add(table_of_steps(found, options))
    report.add(table_of_marks(found))
    report.add(table_of_events(events_per_second(500 if options.quick else 20_000)))
    report.write(options.results)


# ── a step with everything on ─────────────────────────────────────────────────────────────────────────────────────


def table_of_steps(found: Sequence[dict[str, Any]], options: argparse.Namespace) -> Table:
    rows: list[Sequence[str | float | None]] = []
    for nproc, each in enumerate(found, 1):
        times = each["seconds"]
        for name in (ON, AGAIN):
            against = ratios(times[name], times[OFF])
            rows.append(
                [
                    f"{nproc} process{'es' * (nproc > 1)}, {name}",
                    statistics.median(times[name]) * 1e3,
                    statistics.median(times[OFF]) * 1e3,
                    f"{statistics.median(against):.4f}",
                    shown(interval(against)),
                    f"{each['observers']:.2%}" if name == ON else None,
                ]
            )
    return Table(
        title="Everything on against everything off",
        columns=[
            "run",
            "ms a step",
            "ms a step, off",
            "ratio",
            "its 95 % interval",
            "its observers by their own phase",
        ],
        rows=rows,
        notes=[f"{options.rounds} rounds of {options.block} steps of each. `off, again` is the noise."],
    )


def table_of_marks(found: Sequence[dict[str, Any]]) -> Table:
    rows: list[Sequence[str | float | None]] = []
    for nproc, each in enumerate(found, 1):
        cost = each["marks"] * each["mark_seconds"]
        share = f"{cost / statistics.median(each['seconds'][OFF]):.3%}"
        rows.append([nproc, each["marks"], each["mark_seconds"] * 1e6, each["idle_seconds"] * 1e6, cost * 1e6, share])
    return Table(
        title="The marks of the phases",
        columns=["processes", "marks a step", "us a mark", "us without a stopwatch", "us a step", "of the step"],
        rows=rows,
        notes=["A mark is entered and left; its time is that of an empty one, in a loop."],
    )


def on_rank(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from trainfleet import Mesh

    sys.path.append(str(ROOT / "recipes"))
    torch.set_num_threads(1)
    with Mesh.from_env(recipe_of(options, Path()).plan, device="cpu") as mesh, tempfile.TemporaryDirectory() as folder:
        found = compare(options, mesh, Path(mesh.world.exchange(folder)[0]))
        if mesh.is_main:
            options.answer.write_text(json.dumps(found))
        dist.barrier()


def recipe_of(options: argparse.Namespace, folder: Path) -> Any:
    """That of `make train`, without what is no step."""
    from trainfleet.config import load_config
    from trainfleet.training.recipe import Recipe

    recipe = load_config(Recipe, file=ROOT / "recipes" / "gpt_stdlib.yaml", env={}).value
    if options.quick:
        recipe = replace(recipe, model=replace(recipe.model, args={"width": 32, "depth": 2, "heads": 2}))
    train = replace(recipe.train, steps=10**6, evaluate_every=None, finish=None)
    return replace(
        recipe,
        folder=str(folder),
        train=train,
        data=replace(recipe.data, evaluation=None),
        checkpoint=replace(recipe.checkpoint, every=None, resume="auto"),
    )


def compare(options: argparse.Namespace, mesh: Any, folder: Path) -> dict[str, Any]:
    from loops import turns

    from trainfleet import stopwatch
    from trainfleet.stopwatch import Stopwatch, timed

    class Unmeasured(Stopwatch):
        """While it is entered marks find no stopwatch, not even that of the run whose turn it is not."""

        def __enter__(self) -> Stopwatch:
            super().__enter__()
            stopwatch._running.watch = None
            return self

        def take(self) -> dict[str, float]:
            return {}

    class Counting(Stopwatch):
        opened = 0

        def open(self, phase: str) -> None:
            self.opened += 1
            super().open(phase)

    seconds: dict[str, list[float]] = {OFF: [], AGAIN: [], ON: []}
    block, rounds = options.block, options.rounds
    with ExitStack() as closing:
        off = {}
        for name in (OFF, AGAIN):
            off[name] = closing.enter_context(run(all_off(recipe_of(options, folder / name)), mesh))
            off[name]._stopwatch = Unmeasured()
            off[name].fit(WARM_UP)

        def others() -> None:
            for name in random.Random(len(seconds[OFF])).sample([OFF, AGAIN], 2):
                mesh.world.barrier()
                begun = time.perf_counter()
                off[name].fit(off[name].step + block)
                seconds[name].append((time.perf_counter() - begun) / block)
            mesh.world.barrier()

        turns.BREAKS = {WARM_UP + i * block for i in range(rounds + 1)}
        turns.between = lambda: others() if len(seconds[OFF]) < rounds else None
        on = closing.enter_context(run(all_on(recipe_of(options, folder / ON)), mesh))
        on.fit(WARM_UP + rounds * block + 1)
        seconds[ON] = [each / block for each in turns.blocks]
        counting = off[OFF]._stopwatch = Counting()
        off[OFF].fit(off[OFF].step + block)
        observers = share_of_observers(folder / ON / "metrics.jsonl") if mesh.is_main else 0.0
    idle = per_mark(timed)
    with Stopwatch():
        running = per_mark(timed)
    return {
        "seconds": seconds,
        "observers": observers,
        "marks": counting.opened / block,
        "mark_seconds": running,
        "idle_seconds": idle,
    }


@contextmanager
def run(recipe: Any, mesh: Any) -> Iterator[Any]:
    from trainfleet.training.job import Given, prepared

    with prepared(recipe, mesh, Given()) as trainer:
        yield trainer


def all_on(recipe: Any) -> Any:
    """What can be written here, and all else that the section has by default."""
    monitor = replace(recipe.monitor, console=True, jsonl=True, csv=True, tensorboard=True, curve=True, mfu=True)
    return replace(recipe, monitor=monitor, train=replace(recipe.train, step_fn="loops.turns:step"))


def all_off(recipe: Any) -> Any:
    return replace(recipe, monitor=replace(off(recipe.monitor), log_interval=10**9))


def off(section: Any) -> Any:
    """With every switch at false, and watching for no anomaly."""
    from trainfleet.events import ANOMALIES

    changed: dict[str, Any] = {}
    for each in fields(section):
        value = getattr(section, each.name)
        if is_dataclass(value):
            changed[each.name] = off(value)
        elif isinstance(value, bool):
            changed[each.name] = False
        elif each.name in ANOMALIES:
            changed[each.name] = None
    return replace(section, **changed)


def share_of_observers(path: Path) -> float:
    """Of the time of the steps behind the warm-up, in which the others' turns lie in `other`."""
    steps = [row for row in map(json.loads, path.read_text().splitlines()) if row["event"] == "StepEnded"]
    steps = [row for row in steps if row["step"] > WARM_UP]
    work = sum(sum(row["phases"].values()) - row["phases"]["other"] for row in steps)
    return float(sum(row["phases"]["observers"] for row in steps) / work)


def per_mark(timed: Callable[[str], Any], count: int = 100_000) -> float:
    """Seconds, the best of five loops."""
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(count):
            with timed("forward"):
                pass
        best = min(best, time.perf_counter() - begun)
    return best / count


# ── events a second ───────────────────────────────────────────────────────────────────────────────────────────────


def table_of_events(found: dict[str, float | None]) -> Table:
    return Table(
        title="Steps told a second, until all of it is written",
        columns=["who is told", "steps a second", "us a step"],
        rows=[
            [name, f"{rate:,.0f}" if rate else "not installed", 1e6 / rate if rate else None]
            for name, rate in found.items()
        ],
        notes=[
            "Each step has 22 numbers, ten of them its phases. Lines and TensorBoard are told to show every step, not "
            "every tenth. Ours write each step before the next one, so nothing is lost with the process; torch's "
            "SummaryWriter and Lightning's loggers hand it to a thread, or keep it until they are closed."
        ],
    )


def events_per_second(count: int) -> dict[str, float | None]:
    from trainfleet.monitor import JsonLines, LossCurve, TensorBoard
    from trainfleet.monitor.csv_table import CsvTable
    from trainfleet.monitor.lines import Lines

    events = [step_of(i) for i in range(1, count + 1)]
    found: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        makers: dict[str, Callable[[Path], list[Any]]] = {
            "console lines": lambda to: [Lines(io.StringIO(), log_interval=1)],
            "metrics.jsonl": lambda to: [JsonLines(to / "metrics.jsonl")],
            "metrics.csv": lambda to: [CsvTable(to / "metrics.csv")],
            "TensorBoard": lambda to: [TensorBoard(to / "tensorboard")],
            "picture (not drawn)": lambda to: [LossCurve(to / "loss.png")],
        }
        makers["all of them"] = lambda to: [each for make in list(makers.values())[:5] for each in make(to)]
        for title, make in makers.items():
            (folder / title).mkdir()
            found[title] = rate_of(make(folder / title), events)
        for title, (package, rival) in RIVALS.items():
            found[title] = count / rival(folder / "rivals", events) if version_of(package) else None
    return found


def rate_of(observers: Sequence[Any], events: Sequence[Any]) -> float:
    from trainfleet.events import Observers

    told = Observers(observers)
    begun = time.perf_counter()
    for event in events:
        told.emit(event)
    told.close()
    return len(events) / (time.perf_counter() - begun)


def step_of(step: int) -> Any:
    from trainfleet.events import StepEnded
    from trainfleet.stopwatch import PHASES

    return StepEnded(
        step=step,
        loss=5.5 - step % 100 / 50,
        learning_rate=5e-3,
        grad_norm=1.0 + step % 7,
        samples=16,
        tokens=4096,
        seconds=0.31,
        data_seconds=0.001,
        between_seconds=0.001,
        phases=dict.fromkeys(PHASES, 0.0311),
        memory_bytes=400_000_000,
        mfu=0.6,
    )


def scalars_of(event: Any) -> dict[str, float]:
    from trainfleet.monitor.csv_table import numbers_of

    return numbers_of(event)


def with_summary_writer(folder: Path, events: Sequence[Any]) -> float:
    from torch.utils.tensorboard import SummaryWriter

    rows = [(event.step, scalars_of(event)) for event in events]
    begun = time.perf_counter()
    writer = SummaryWriter(str(folder / "summary_writer"))  # type: ignore[no-untyped-call]
    for step, values in rows:
        for name, value in values.items():
            writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
    writer.close()  # type: ignore[no-untyped-call]
    return time.perf_counter() - begun


def with_lightning(kind: str) -> Callable[[Path, Sequence[Any]], float]:
    def run_it(folder: Path, events: Sequence[Any]) -> float:
        from lightning_fabric import loggers

        rows = [(event.step, scalars_of(event)) for event in events]
        begun = time.perf_counter()
        logger = getattr(loggers, kind)(str(folder / kind))
        for step, values in rows:
            logger.log_metrics(values, step)
        logger.finalize("success")
        return time.perf_counter() - begun

    return run_it


RIVALS: dict[str, tuple[str, Callable[[Path, Sequence[Any]], float]]] = {
    "torch.utils.tensorboard.SummaryWriter": ("torch", with_summary_writer),
    "Lightning Fabric's TensorBoardLogger": ("lightning-fabric", with_lightning("TensorBoardLogger")),
    "Lightning Fabric's CSVLogger": ("lightning-fabric", with_lightning("CSVLogger")),
}


if __name__ == "__main__":
    main()
