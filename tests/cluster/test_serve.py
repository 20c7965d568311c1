"""A service or a client that is killed, or stands still, loses no answer and leaves nothing held."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from left_behind import nothing_left_behind
from serve.made import VALIDATE, Weighted, all_same, batches, local, same

from trainfleet.errors import NotAdmitted
from trainfleet.net import line
from trainfleet.serve import ModelService, RemoteModel

pytestmark = pytest.mark.cluster

TESTS = Path(__file__).parents[1]

SERVICE = """
import sys
sys.path.insert(0, sys.argv[1])
from serve.made import Weighted
from trainfleet.serve.service import ModelService

with ModelService(Weighted(int(sys.argv[3]), seconds=0.002), address=sys.argv[2]).open() as service:
    print(service.address, flush=True)
    sys.stdin.read()
"""

CLIENT = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from serve.made import VALIDATE
from trainfleet.serve.remote import RemoteModel

def endless():
    while True:
        yield {"x": np.zeros((64, 4096), np.float32)}

with RemoteModel(sys.argv[2], nearby=sys.argv[3] == "nearby") as model:
    for number, _ in enumerate(model.answers(endless(), VALIDATE)):
        if number == 20:
            print("goes", flush=True)
"""


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    with nothing_left_behind():
        yield


@contextmanager
def process(program: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """It, and the first line that it says."""
    command = [sys.executable, "-c", program, str(TESTS), *arguments]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    try:
        yield started, started.stdout.readline().strip()
    finally:
        started.kill()
        started.communicate()


def service(address: str = "127.0.0.1:0", weight: int = 3):
    return process(SERVICE, address, str(weight))


def test_a_service_that_is_killed_is_replaced_by_the_other():
    with service() as (first, one), service() as (_, other), RemoteModel([one, other]) as model:
        answers, expected = model.answers(batches(300), VALIDATE), iter(local(300))
        for number, answer in enumerate(answers):
            assert same(answer, next(expected)), number
            if number == 50:
                first.kill()
        assert number == 299 and model.services.lost == 1


def test_a_lone_service_that_is_killed_goes_on_when_it_is_started_again():
    with service() as (first, place), RemoteModel(place) as model:
        answers, expected = model.answers(batches(200), VALIDATE), iter(local(200))
        for number in range(50):
            assert same(next(answers), next(expected)), number
        first.kill()
        first.wait()
        with service(place) as (_, again):
            assert again == place
            assert all_same(answers, expected)
        assert model.services.lost >= 1 and model.services.repeated >= 1


@pytest.mark.matrix
def test_one_that_comes_back_with_other_weights_is_refused():
    with service() as (first, place), RemoteModel(place, timeout=timedelta(seconds=20)) as model:
        answers = model.answers(batches(200), VALIDATE)
        next(answers)
        first.kill()
        first.wait()
        with service(place, weight=4), pytest.raises(NotAdmitted, match="has other weights"):
            list(answers)


def test_a_service_that_stands_still_is_given_up_for_the_other(monkeypatch):
    monkeypatch.setattr(line, "SILENCE_SECONDS", 3.0)  # the process says that it is alive every 2 s
    with (
        service() as (still, one),
        ModelService(Weighted(), address="127.0.0.1:0").open() as other,
        RemoteModel([one, str(other.address)]) as model,
    ):
        begun, expected = time.monotonic(), iter(local(200))
        for number, answer in enumerate(model.answers(batches(200), VALIDATE)):
            assert same(answer, next(expected)), number
            if number == 30:
                os.kill(still.pid, signal.SIGSTOP)
        assert number == 199 and time.monotonic() - begun < 12


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("way", ["nearby", "tcp"])
def test_a_client_that_is_killed_leaves_nothing_at_the_service(way):
    with ModelService(Weighted(seconds=0.01), address="127.0.0.1:0").open() as served:
        descriptors = num_descriptors()
        with process(CLIENT, str(served.address), way) as (client, said):
            assert said == "goes" and served.served.held_bytes > 0
            client.kill()
            client.wait()
            deadline = time.monotonic() + 5
            while (now := served.served).clients or now.waiting or now.held_bytes:
                assert time.monotonic() < deadline, now
                time.sleep(0.02)
            deadline = time.monotonic() + 5
            while num_descriptors() > descriptors + 2:  # the pipes of the client
                assert time.monotonic() < deadline
                time.sleep(0.02)
        with RemoteModel(str(served.address)) as model:
            assert all_same(model.answers(batches(5), VALIDATE), local(5))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_memory_stays_within_the_windows_on_both_sides():
    """Both sides are in this process; 400 batches of 4 MiB go through windows of 16 MiB, to a slow model."""
    window, batch = 16 << 20, {"x": np.zeros((64, 16384), np.float32)}

    def many(count: int):
        for _ in range(count):
            yield {"x": batch["x"] + 1}

    slow = Weighted()
    slow.answer = lambda batch, terms: {"rows": np.array(len(batch["x"]))}  # type: ignore[method-assign]
    with (
        ModelService(slow, address="127.0.0.1:0", window_bytes=window).open() as served,
        RemoteModel(str(served.address), window_bytes=window, nearby=False) as model,
    ):
        for _ in model.answers(many(40), VALIDATE):
            pass
        begun, most, held = resident(), 0, 0
        for number, _ in enumerate(model.answers(many(400), VALIDATE)):
            if number % 20 == 0:
                time.sleep(0.02)
                most, held = max(most, resident()), max(held, served.served.held_bytes, model.services.held_bytes)
    assert held <= window + (4 << 20)
    assert most - begun < 2 * window + (32 << 20), "both windows, a batch each, and buffers that are used again"
