"""Who is quicker than the other waits without work, and holds no more than it said."""

from __future__ import annotations

import multiprocessing
import time

import numpy as np
import psutil
import pytest

from trainfleet.data.feed import DataService, RemoteBatches
from trainfleet.data.loader import LocalBatches

pytestmark = pytest.mark.cluster

SAMPLE_BYTES, SIZE = 1 << 18, 8
UNIT_BYTES = SAMPLE_BYTES * SIZE
BUFFER_BYTES = 8 * UNIT_BYTES


class Large:
    """A quarter of a MiB a sample, made after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> np.ndarray:
        time.sleep(self.seconds)
        return np.full(SAMPLE_BYTES, index % 251, np.uint8)


def serve(seconds: float, answers) -> None:
    stream = LocalBatches(Large(seconds), size=SIZE, workers=1, collate="numpy")
    service = DataService(stream, address="127.0.0.1:0").open()
    answers.put(str(service.address))
    time.sleep(600)


@pytest.fixture
def feeder():
    context = multiprocessing.get_context("forkserver")
    started = []

    def start(seconds: float) -> tuple[str, psutil.Process]:
        answers = context.Queue()
        process = context.Process(target=serve, args=(seconds, answers))
        process.start()
        started.append(process)
        return answers.get(timeout=60), psutil.Process(process.pid)

    yield start
    for process in started:
        process.kill()
        process.join(10)


def resident(process: psutil.Process) -> int:
    return sum(each.memory_info().rss for each in [process, *process.children(recursive=True)])


def cpu_seconds(process: psutil.Process) -> float:
    return sum(sum(each.cpu_times()[:2]) for each in [process, *process.children(recursive=True)])


@pytest.mark.parametrize("nearby", [True, False])
def test_a_slow_loop_bounds_the_memory_of_both_sides_and_nobody_works(feeder, nearby):
    address, process = feeder(0.0)
    here = psutil.Process()
    before = resident(process)
    with RemoteBatches(address, as_numpy=True, buffer_bytes=BUFFER_BYTES, nearby=nearby) as batches:
        mine = here.memory_info().rss
        for _ in range(10):
            next(batches)
            time.sleep(0.05)
        time.sleep(0.5)  # whatever comes has come
        theirs, ours = cpu_seconds(process), sum(here.cpu_times()[:2])
        held = batches.feeders.depth * UNIT_BYTES
        assert held <= BUFFER_BYTES
        time.sleep(1.0)
        assert cpu_seconds(process) - theirs < 0.1, "the feeder waits without work"
        assert sum(here.cpu_times()[:2]) - ours < 0.1, "and so do we"
        # Buffers are kept for the next batch, and shared memory counts on both sides.
        assert here.memory_info().rss - mine < 4 * BUFFER_BYTES
        assert resident(process) - before < 4 * BUFFER_BYTES


def test_a_slow_feeder_is_waited_for_without_work(feeder):
    address, _ = feeder(0.05)
    here = psutil.Process()
    with RemoteBatches(address, as_numpy=True) as batches:
        next(batches)
        began, ours = time.monotonic(), sum(here.cpu_times()[:2])
        for _ in range(5):
            next(batches)
        elapsed = time.monotonic() - began
        assert elapsed > 1.0 and sum(here.cpu_times()[:2]) - ours < 0.15 * elapsed
        assert batches.feeders.seconds_waited > 0.8 * elapsed
