"""Samples per second of LocalBatches and torch's DataLoader over the same source, interleaved in one run.

    python benchmarks/data_loader.py [--quick]

Three sources: `heavy` spends 2 ms of CPU on each sample, `large` makes batches of 16 MiB, `small` samples of
a few numbers. Each loader is warm before it is timed. "loop" is the CPU time of the training process a batch:
what the loader takes from it. The first line of each source is LocalBatches against itself, as the noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring.table import RESULTS, Report, Table
from torch.utils.data import DataLoader

from trainfleet.data import LocalBatches, Sampler


class Heavy:
    """Work such as decoding an image: 2 ms of one core."""

    batch = 16

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        end = time.thread_time() + 0.002
        x = np.arange(3000, dtype=np.float32)
        while time.thread_time() < end:
            x = np.sqrt(x)
        return {"input": x, "target": index}


class Large:
    """Samples of 1 MiB."""

    batch = 16

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": np.full((256, 1024), index, np.float32), "target": index}


class Small:
    """Samples of a few numbers, of which the overhead is all there is."""

    batch = 64

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": np.full(32, index, np.float32), "target": index}


def ours(source: Any, workers: int) -> tuple[Iterator[Any], Callable[[], None]]:
    stream = LocalBatches(source, size=source.batch, workers=workers, prefetch=2)
    return stream, stream.close


def torchs(source: Any, workers: int) -> tuple[Iterator[Any], Callable[[], None]]:
    loader = DataLoader(source, batch_size=source.batch, sampler=Sampler(source), num_workers=workers)
    return iter(loader), lambda: None


def measure(stream: Iterator[Any], batch: int, seconds: float) -> tuple[float, float]:
    """(samples per second, CPU milliseconds of this process a batch)."""
    began, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        # One element a page, as a training loop would read the memory it is handed.
        next(stream)["input"].reshape(-1)[::1024].sum()
        count += 1
    return count * batch / (time.perf_counter() - began), (time.process_time() - cpu) / count * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tenths of a second, only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 0.05, 1
    torch.set_num_threads(1)
    report = Report(name="data_loader", summary=__doc__.split("\n\n")[2].replace("\n", " "))
    report.add(
        Table(
            title=f"LocalBatches and torch's DataLoader, {options.rounds} rounds of {options.seconds} s",
            columns=["source", "workers", "loader", "samples/s", "ratio", "loop, ms of CPU a batch"],
            rows=[row for source in (Heavy(), Large(), Small()) for row in rows_of(source, options)],
        )
    )
    report.write(options.results)


def rows_of(source: Any, options: argparse.Namespace) -> Iterator[list[str | float | None]]:
    for workers in (0, 2):
        loaders = {"LocalBatches": ours, "LocalBatches again": ours, "DataLoader": torchs}
        opened = {name: make(source, workers) for name, make in loaders.items()}
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
        for _ in range(options.rounds):
            for name, (stream, _) in opened.items():
                for _ in range(4):
                    next(stream)
                figures[name].append(measure(stream, source.batch, options.seconds))
        for _, close in opened.values():
            close()
        base = statistics.median(rate for rate, _ in figures["LocalBatches"])
        for name, rounds in figures.items():
            rate, loop = (statistics.median(column) for column in zip(*rounds))
            row = [type(source).__name__.lower(), str(workers), name, f"{rate:,.0f}", f"{rate / base:.2f}"]
            yield [*row, f"{loop:.2f}"]


if __name__ == "__main__":
    main()
