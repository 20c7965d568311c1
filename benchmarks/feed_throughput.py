"""Arrays from one process to another on this host: GB/s, and CPU seconds of both ends per GB, beside other ways.

    python benchmarks/feed_throughput.py [--quick] [--tensorflow PYTHON]

A feeder sends one array again and again as fast as it is taken, a trainer takes it and reads one byte of each page;
the bytes are compared. All ways are open during the whole run and take turns, in another order each round. The clock
runs from the first payload that has arrived to the last. CPU is that of both processes, user and system. trainfleet
over TCP has a digest (XXH3-128) over every payload, none of the others has one. `one host` is what two ends of
trainfleet do by themselves where they find each other on one host: shared memory; for the rows of TCP and TLS that is
switched off. Ways whose one payload takes longer than a few blocks take part in three rounds only. Everything with TLS
has TLS 1.3; raw TLS and trainfleet use the cipher that OpenSSL puts first, AES-256-GCM. tf.data service is measured in
a run of its own, beside raw TCP alone, by an interpreter that has tensorflow: the dispatcher and a worker in one
process, one consumer in another.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import random
import shlex
import statistics
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from feeds.sockets import pages_of
from feeds.ways import NEEDS, WAYS
from measuring.machine import version_of
from measuring.rounds import interval, ratios
from measuring.table import RESULTS, Report, Table

OURS, RAW = "trainfleet, TCP", "raw TCP"
OURS_TLS, RAW_TLS = "trainfleet, TLS", "raw TLS"
OURS_NEARBY, RAW_MEMORY = "trainfleet, one host", "shared memory, one copy"
SPINNING = "shared memory, spinning"
TCP_TARGET, CPU_TARGET, TLS_TARGET, NEARBY_TARGET = 0.95, 0.45, 0.95, 3.0
ENOUGH_SECONDS = 300.0
SLOW_BLOCKS, SLOW_ROUNDS = 4, 3
VERSIONS = ("pyarrow", "grpcio", "pyzmq", "xxhash")


class TensorflowWay:
    """tf.data service, by another interpreter."""

    name = "tf.data service"

    def __init__(self, python: str) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        feeder = self._started(python, "feeder")
        self.version: str = feeder["version"]
        self._started(python, "trainer", feeder["address"], str(feeder["pid"]))

    def run(self, size: int, count: int) -> tuple[float, float]:
        """As of `Way`."""
        pipe = self._processes[-1].stdin
        assert pipe is not None
        pipe.write(f"{size} {count}\n")
        pipe.flush()
        answer = self._answer(self._processes[-1])
        return size * count / answer["wall"], answer["cpu"] / count / size

    def close(self) -> None:
        for process in self._processes[::-1]:
            process.kill()
            process.wait()

    def _started(self, *command: str) -> Any:
        script = Path(__file__).parent / "feeds" / "tensorflow_service.py"
        process = subprocess.Popen(
            [command[0], str(script), *command[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._processes.append(process)
        return self._answer(process)

    def _answer(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            command = shlex.join(map(str, process.args))
            raise SystemExit(
                f"{self.name} needs an interpreter with tensorflow or tensorflow-cpu. `{command}` ended with "
                f"{process.wait()}; run it to see why."
            )
        return json.loads(line)


class Way:
    """A feeder and a trainer, each in a process of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for role in ("feeder", "trainer"):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(name, role, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        feeder, trainer = self._pipes
        trainer.send(self._answer(feeder))

    def run(self, size: int, count: int) -> tuple[float, float]:
        """(bytes a second, CPU seconds a byte) of `count` payloads of `size` bytes, after one that is not timed."""
        for pipe in self._pipes:
            pipe.send((size, count))
        feeder, trainer = (self._answer(pipe) for pipe in self._pipes)
        return size * count / trainer["wall"], (feeder["cpu"] / (count + 1) + trainer["cpu"] / count) / size

    def close(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send(None)
        for process in self._processes:
            process.join(5)
            process.kill()

    def _answer(self, pipe: Connection) -> Any:
        if not pipe.poll(ENOUGH_SECONDS):
            raise SystemExit(f"{self.name} said nothing for {ENOUGH_SECONDS:g} s.")
        return pipe.recv()


def serve(name: str, role: str, pipe: Connection) -> None:
    """In a process of its own: one end of one way, until None comes."""
    feeder_class, trainer_class = WAYS[name]
    if role == "feeder":
        end = feeder_class()
        pipe.send(end.address)
    else:
        end = trainer_class(pipe.recv())
    payloads: dict[int, Any] = {}
    while (asked := pipe.recv()) is not None:
        size, count = asked
        payload = payloads.setdefault(size, np.random.default_rng(size).integers(0, 256, size, np.uint8))
        if role == "feeder":
            began = time.process_time()
            end.feed(payload, count + 1)
            pipe.send({"cpu": time.process_time() - began})
        else:
            pipe.send(taken(end.take(size, count + 1), payload, count))


def taken(arriving: Any, payload: Any, count: int) -> dict[str, float]:
    right = pages_of(payload)
    assert np.array_equal(next(arriving), payload)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        assert pages_of(next(arriving)) == right
    found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    for _ in arriving:
        raise AssertionError("more came than was sent")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few payloads and rounds, only to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--no-rivals", action="store_true", help="only raw sockets, and ours")
    parser.add_argument("--only", nargs="*", help="ways by name")
    parser.add_argument("--tensorflow", metavar="PYTHON", help="an interpreter that has tensorflow or tensorflow-cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each block")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 2, 0.01
    names = [name for name in WAYS if not options.no_rivals or name.startswith(("raw", "trainfleet"))]
    names = [name for name in names if options.only is None or name in options.only]
    missing = [name for name in names if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]
    report = Report(name="feed_throughput", summary=" ".join(__doc__.split("\n\n", 2)[2].split()))
    sizes = (1, 2) if options.quick else (1, 16)
    with ExitStack() as opened:
        ways: list[Way | TensorflowWay] = [Way(name) for name in names if name not in missing]
        for way in ways:
            opened.callback(way.close)
        for mebibytes in sizes:
            figures = measure(ways, mebibytes << 20, options.rounds, options.seconds)
            report.add(table_of(figures, missing, mebibytes, options))
    if options.tensorflow:
        with ExitStack() as opened:
            service = TensorflowWay(options.tensorflow)
            ways = [Way(RAW), service]
            for way in ways:
                opened.callback(way.close)
            for mebibytes in sizes:
                figures = measure(ways, mebibytes << 20, options.rounds, options.seconds)
                table = table_of(figures, [], mebibytes, options)
                title, words = f"In a run of its own: {table.title}", f"Versions: tensorflow {service.version}."
                report.add(replace(table, title=title, notes=[words]))
    report.write(options.results)


def measure(
    ways: Sequence[Way | TensorflowWay], size: int, rounds: int, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """Of each way, (GB/s, CPU s/GB) of each round; blocks take about `seconds`, and one payload at least."""
    counts, slow = {}, set[str]()
    for way in ways:
        rate, _ = way.run(size, 1)
        if rate * seconds > size:
            rate, _ = way.run(size, 8)
        counts[way.name] = max(1, int(rate * seconds / size))
        slow |= {way.name} if size / rate > SLOW_BLOCKS * seconds else set()
    figures: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    for number in range(rounds):
        taking_part = [way for way in ways if number < SLOW_ROUNDS or way.name not in slow]
        for way in random.Random(number).sample(taking_part, len(taking_part)):
            rate, cpu = way.run(size, counts[way.name])
            figures[way.name].append((rate / 1e9, cpu * 1e9))
    return figures


def table_of(
    figures: dict[str, list[tuple[float, float]]], missing: list[str], mebibytes: int, options: argparse.Namespace
) -> Table:
    rates = {name: [rate for rate, _ in rounds] for name, rounds in figures.items()}
    cpu = {name: [seconds for _, seconds in rounds] for name, rounds in figures.items()}
    rows: list[Sequence[str | float | None]] = []
    for name in figures:
        raw = rates.get(RAW, [])[: len(rates[name])]
        of_raw = _with_interval(ratios(rates[name], raw)) if raw else [None, None]
        rows.append([name, *_with_interval(rates[name]), *of_raw, *_with_interval(cpu[name])])
    rows += [[name, "not installed", *[None] * 5] for name in missing]
    return Table(
        title=f"{mebibytes} MiB a payload, {options.rounds} rounds of {options.seconds:g} s each",
        columns=["way", "GB/s", "95 %", "of raw TCP", "95 %", "CPU s/GB", "95 %"],
        rows=rows,
        notes=[
            marks(rates, cpu),
            "Versions: "
            + ", ".join(f"{package} {version_of(package) or 'not installed'}" for package in VERSIONS)
            + ".",
        ],
    )


def marks(rates: dict[str, list[float]], cpu: dict[str, list[float]]) -> str:
    """What was to be reached, and what was."""

    def of(ours: str, theirs: str) -> float:
        return statistics.median(ratios(rates[ours], rates[theirs]))

    def verdict(holds: bool) -> str:
        return "holds" if holds else "MISSED"

    found = []
    if {OURS, RAW} <= rates.keys():
        ratio, seconds = of(OURS, RAW), statistics.median(cpu[OURS])
        found.append(
            f"{OURS}: {ratio:.2f} of raw TCP (at least {TCP_TARGET}: {verdict(ratio >= TCP_TARGET)}) "
            f"at {seconds:.2f} CPU s/GB (at most {CPU_TARGET}: {verdict(seconds <= CPU_TARGET)})."
        )
    if {OURS_TLS, RAW_TLS} <= rates.keys():
        ratio = of(OURS_TLS, RAW_TLS)
        found.append(f"{OURS_TLS}: {ratio:.2f} of raw TLS (at least {TLS_TARGET}: {verdict(ratio >= TLS_TARGET)}).")
    if {OURS_NEARBY, RAW} <= rates.keys():
        ratio = of(OURS_NEARBY, RAW)
        by_hand = {"by hand": RAW_MEMORY, "by hand without ever sleeping": SPINNING}
        words = [f"{how}: {of(name, RAW):.1f} times" for how, name in by_hand.items() if name in rates]
        found.append(
            f"{OURS_NEARBY}: {ratio:.1f} times raw TCP "
            f"({'; '.join([f'at least {NEARBY_TARGET:g}: {verdict(ratio >= NEARBY_TARGET)}', *words])})."
        )
    return " ".join(found)


def _with_interval(values: Sequence[float]) -> list[str]:
    low, high = interval(values)
    digits = 2 if statistics.median(values) >= 0.1 else 4
    return [f"{statistics.median(values):.{digits}f}", f"{low:.{digits}f} to {high:.{digits}f}"]


if __name__ == "__main__":
    main()
