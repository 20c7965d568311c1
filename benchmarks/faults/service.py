"""A run over tf.data service whose workers are killed again and again, and what became of its samples."""

from __future__ import annotations

import json
import queue
import random
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from faults.parts import SAMPLES

DEADLINE: Final = 60.0
BETWEEN: Final = (10, 60)
"""Samples from a worker's return to the next kill, at random."""


@dataclass
class Served:
    """What came of a run."""

    version: str
    kills: int = 0
    epochs: int = 0
    lost: int = 0
    doubled: int = 0
    hung: bool = False
    """No sample within the deadline: the epoch under way is not counted."""


class Service:
    """Dispatcher, workers and one consumer, by an interpreter that has tensorflow."""

    def __init__(self, python: str, policy: str, workers: int) -> None:
        self._python, self._opened = python, ExitStack()
        folder = self._opened.enter_context(tempfile.TemporaryDirectory(prefix="trainfleet-bench-"))
        try:
            told = _line_of(self._started("dispatcher", folder))
            self.version: str = told["version"]
            self._dispatcher = told["target"].split("://")[1]
            self._ports = [_free_port() for _ in range(workers)]
            self._workers = {port: self._worker(port) for port in self._ports}
            for worker in self._workers.values():
                _line_of(worker)
            self._replaced = threading.Thread()
            self.consumer = self._started("consumer", told["target"], policy, str(SAMPLES))
            _line_of(self.consumer)
            self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
            threading.Thread(target=self._read, daemon=True).start()
        except BaseException:
            self._opened.close()
            raise

    def replace_one(self, rng: random.Random) -> None:
        """Kill a worker and start it again within 0.3 s. Returns when that has begun: it takes a while to be there."""
        port = rng.choice(self._ports)
        self._workers[port].kill()
        self._workers[port].wait()
        time.sleep(rng.uniform(0.0, 0.3))
        self._workers[port] = self._worker(port)
        self._replaced = threading.Thread(target=_line_of, args=(self._workers[port],), daemon=True)
        self._replaced.start()

    @property
    def is_whole(self) -> bool:
        """All workers are there."""
        return not self._replaced.is_alive()

    def close(self) -> None:
        self._opened.close()

    def _read(self) -> None:
        assert self.consumer.stdout is not None
        for line in self.consumer.stdout:
            self.lines.put(line)
        self.lines.put("")

    def _worker(self, port: int) -> subprocess.Popen[str]:
        return self._started("worker", self._dispatcher, str(port))

    def _started(self, *arguments: str) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("tensorflow_service.py")
        process = subprocess.Popen(
            [self._python, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._opened.callback(_end, process)
        return process


def serve_with_kills(python: str, policy: str, *, workers: int, kills: int, seed: int) -> Served:
    """Whole epochs until a worker was killed so often, and started again within 0.3 s; one epoch where none is."""
    rng = random.Random(seed)
    service = Service(python, policy, workers)
    try:
        served = Served(service.version)
        while served.epochs == 0 or served.kills < kills:
            uses = _epoch(service, served, kills, rng)
            if uses is None:
                served.hung = True
                break
            served.epochs += 1
            served.lost += sum(uses[index] == 0 for index in range(SAMPLES))
            served.doubled += sum(max(0, count - 1) for count in uses.values())
        return served
    finally:
        service.close()


def _epoch(service: Service, served: Served, kills: int, rng: random.Random) -> Counter[int] | None:
    """Uses of each sample; None where no more came."""
    words = service.consumer.stdin
    assert words is not None
    words.write("go\n")
    words.flush()
    uses: Counter[int] = Counter()
    left = rng.randint(*BETWEEN)
    while True:
        try:
            line = service.lines.get(timeout=DEADLINE)
        except queue.Empty:
            return None
        if not line:
            return None  # the consumer ended by an error
        index = json.loads(line)
        if index is None:
            return uses
        uses[index] += 1
        left -= service.is_whole
        if left <= 0 and served.kills < kills:
            service.replace_one(rng)
            served.kills += 1
            left = rng.randint(*BETWEEN)


def _line_of(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"tf.data service needs an interpreter with tensorflow: {process.args} ended.")
    return json.loads(line)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
