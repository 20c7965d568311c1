"""The seconds that a loop waited go to what was the limit, and none is lost."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tried import found_in_one_of_three

from trainfleet.data.loader import LocalBatches
from trainfleet.data.samples import Made
from trainfleet.data.waits import CAUSES, Waits, Way, causes_of

SECONDS = st.floats(0, 1e3)


@given(SECONDS, st.tuples(SECONDS, SECONDS), st.none() | st.builds(Way, SECONDS, SECONDS, SECONDS))
def test_causes_are_all_that_was_waited(seconds, spent, way):
    causes = causes_of(seconds, Made(None, spent=spent, way=way))
    assert sum(causes.values()) == pytest.approx(seconds)
    assert set(causes) <= set(CAUSES) and all(share >= -1e-9 for share in causes.values())


def made(queued, outbox, transit, source=0.02, transform=0.01):
    return Made(None, spent=(source, transform), way=Way(queued, outbox, transit))


def test_the_queue_says_what_is_the_limit():
    assert causes_of(0.03, made(0.2, 0.0, 0.02)) == pytest.approx({"source": 0.02, "transform": 0.01, "network": 0.0})
    assert causes_of(0.03, made(0.0, 0.2, 0.02)) == pytest.approx({"source": 0.0, "transform": 0.0, "network": 0.03})
    half = causes_of(0.03, made(0.1, 0.1, 0.0))
    assert half == pytest.approx({"source": 0.01, "transform": 0.005, "network": 0.015})


def test_without_a_queue_the_way_here_came_last():
    assert causes_of(0.05, made(0.0, 0.0, 0.02))["network"] == pytest.approx(0.02)
    assert causes_of(0.01, made(0.0, 0.001, 5.0))["network"] == pytest.approx(0.01), "it was in the network's buffers"


def test_batches_of_this_host_come_over_no_network():
    assert causes_of(3.0, Made(None, spent=(1.0, 2.0))) == {"source": 1.0, "transform": 2.0, "network": 0.0}
    assert causes_of(3.0, Made(None)) == {"data": 3.0, "network": 0.0}


class Slow:
    def __len__(self):
        return 100

    def __getitem__(self, index):
        time.sleep(0.004)
        return index


def slow(sample):
    time.sleep(0.002)
    return sample


@pytest.mark.parametrize("workers", [0, 1])
@found_in_one_of_three
def test_local_batches_know_what_they_were_waited_for(workers):
    with LocalBatches(Slow(), size=5, workers=workers, transform=slow, collate="numpy") as batches:
        begun = time.monotonic()
        for _ in range(10):
            next(batches)
        seconds, waits = time.monotonic() - begun, batches.waits.seconds
    assert 1.2 < waits["source"] / waits["transform"] < 3.5 and waits["network"] == 0, "2, and what a busy host adds"
    assert 0.7 * seconds < sum(waits.values()) <= seconds


def test_waits_add_up():
    waits = Waits()
    for _ in range(2):
        waits.add(0.5, Made(None, num_bytes=7))
    assert waits.seconds == {"source": 0.0, "transform": 0.0, "network": 0.0, "data": 1.0} and waits.num_bytes == 14
