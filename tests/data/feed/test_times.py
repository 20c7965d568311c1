"""Where time goes is what was planted: sleeps in the source, the transform and the loop, and a slow link."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from datetime import timedelta

import numpy as np
import pytest
from left_behind import nothing_left_behind
from tried import found_in_one_of_three

from trainfleet.data.feed import DataService, RemoteBatches
from trainfleet.data.feed.times import Spent, Times, shares
from trainfleet.data.loader import LocalBatches
from trainfleet.net.link import Link


class Slow:
    """A sample of 100 kB that takes its time."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return np.random.default_rng(index).integers(0, 256, 100_000, np.uint8)


class SlowTransform:
    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, sample, rng):
        time.sleep(self.seconds)
        return sample


def fed(source, transform, step, rate=None, batches=30):
    """Shares of the trainer's wall time and of the feeder's, where each batch is one sample and one step."""
    stream = LocalBatches(Slow(source), size=1, workers=1, transform=SlowTransform(transform), collate="numpy")
    with nothing_left_behind(), ExitStack() as opened:
        service = opened.enter_context(DataService(stream, address="127.0.0.1:0").open())
        place = str(service.address)
        if rate is not None:
            link = opened.enter_context(Link(place, rate=rate))
            place = "{}:{}".format(*link.address)
        stream = opened.enter_context(RemoteBatches(place, as_numpy=True, timeout=timedelta(seconds=20)))
        for _ in range(8):  # until the queues are as they stay
            next(stream)
            time.sleep(step)
        before, served, begun = dict(stream.waits.seconds), service.served, time.monotonic()
        for _ in range(batches):
            next(stream)
            time.sleep(step)
        seconds, now = time.monotonic() - begun, service.served
        trainer = {cause: (stream.waits.seconds[cause] - before[cause]) / seconds for cause in before}
        assert stream.waits.num_bytes > batches * 100_000 and 0 <= stream.ready <= stream.feeders.depth
        assert now.reached is not None and now.reached[0] == 0 and now.reached[1] >= 8 + batches
        return trainer, shares(served.spent, now.spent, seconds=seconds, workers=now.workers)


@found_in_one_of_three
def test_batches_that_are_slow_to_make_are_waited_for_in_source_and_transform():
    trainer, feeder = fed(source=0.02, transform=0.01, step=0.0)
    for told in (trainer, feeder):
        assert told["source"] == pytest.approx(2 / 3, abs=0.12) and told["transform"] == pytest.approx(1 / 3, abs=0.12)
        assert told["network"] < 0.12
    assert feeder["waits for trainers"] < 0.15 and trainer["data"] == 0


@found_in_one_of_three
def test_batches_that_are_slow_to_arrive_are_waited_for_in_the_network():
    trainer, feeder = fed(source=0.002, transform=0.001, step=0.0, rate="32mbit")  # 25 ms for a batch
    assert trainer["network"] > 0.85 and trainer["source"] + trainer["transform"] < 0.1
    # Buffers on the way take the batches at once; that they are under way the feeder hears from the trainer.
    assert feeder["waits for trainers"] < 0.1 and feeder["network"] > 2 * feeder["source"] > feeder["transform"]


@found_in_one_of_three
def test_where_the_loop_is_the_limit_it_waits_for_nothing_and_the_feeder_for_it():
    trainer, feeder = fed(source=0.004, transform=0.002, step=0.03, batches=25)
    assert sum(trainer.values()) < 0.2
    assert feeder["waits for trainers"] > 0.6 and feeder["source"] > feeder["transform"] > feeder["network"]


def test_shares_are_one_together_whatever_is_told():
    for now in (Spent(1, 1, 1), Spent(30, 0, 0), Spent(0, 0, 90), Spent()):
        told = shares(Spent(), now, seconds=2.0, workers=4)
        assert sum(told.values()) == pytest.approx(1) and min(told.values()) >= 0
    assert shares(Spent(), Spent(2, 1, 2), seconds=2.0, workers=4) == pytest.approx(
        {"source": 0.25, "transform": 0.125, "network": 0.625, "waits for trainers": 0}
    )


def test_several_who_send_at_a_time_count_once():
    times, begun = Times(), time.monotonic()

    def send():
        with times.sending():
            time.sleep(0.1)

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    assert 0 < times.spent.sending < 0.1, "one that is under way counts, too"
    for thread in threads:
        thread.join()
    assert 0.1 <= times.spent.sending <= time.monotonic() - begun
