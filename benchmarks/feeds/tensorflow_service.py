"""tf.data service as a way: `python tensorflow_service.py feeder|trainer`, by an interpreter with tensorflow.

The feeder's process has the dispatcher and one worker, which sends one tensor again and again; the trainer's iterates.
Needs nothing but tensorflow, so that it may live in an environment apart. Each says what it found by a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np

PAGE = 4096
WARM = 8
"""Payloads that are not timed: what the client has asked for ahead."""


def feed() -> None:
    from tensorflow import __version__
    from tensorflow.data.experimental import service

    dispatcher = service.DispatchServer(service.DispatcherConfig(port=0))
    address = dispatcher.target.split("://")[1]
    worker = service.WorkerServer(service.WorkerConfig(dispatcher_address=address, port=0))
    say({"address": dispatcher.target, "pid": os.getpid(), "version": __version__})
    sys.stdin.read()
    del worker


def take(address: str, feeder: int) -> None:
    """Answers each line "SIZE COUNT" by seconds of wall clock, and of CPU of both processes."""
    arriving: dict[int, Iterator[Any]] = {}
    say({})
    for line in sys.stdin:
        size, count = map(int, line.split())
        payload = np.random.default_rng(size).integers(0, 256, size, np.uint8)
        right = _pages_of(payload)
        if size not in arriving:
            arriving[size] = iter(_repeated(payload, address))
            assert np.array_equal(next(arriving[size]).numpy(), payload)
        for _ in range(WARM):
            next(arriving[size])
        wall, cpu = time.perf_counter(), _cpu_of(feeder) + time.process_time()
        for _ in range(count):
            assert _pages_of(next(arriving[size]).numpy()) == right
        say({"wall": time.perf_counter() - wall, "cpu": _cpu_of(feeder) + time.process_time() - cpu})


def _repeated(payload: np.ndarray[Any, Any], address: str) -> Any:
    import tensorflow as tf

    service = tf.data.experimental.service
    dataset = tf.data.Dataset.from_tensors(payload).repeat()
    return dataset.apply(service.distribute(processing_mode=service.ShardingPolicy.OFF, service=address))


def _pages_of(payload: np.ndarray[Any, Any]) -> int:
    return int(payload[::PAGE].sum(dtype=np.int64))


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def say(words: dict[str, Any]) -> None:
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    roles: dict[str, Callable[..., None]] = {"feeder": feed, "trainer": lambda place, pid: take(place, int(pid))}
    roles[sys.argv[1]](*sys.argv[2:])
