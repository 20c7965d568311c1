"""A step knows how long it waited for its batches, and what for."""

from __future__ import annotations

import time

import pytest
from tried import found_in_one_of_three

from trainfleet.data.loader import LocalBatches
from trainfleet.errors import DataError
from trainfleet.events import StepEnded
from trainfleet.monitor.limit import Limit
from trainfleet.training.supply import Supply


class Slow:
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return index


def slow(sample: int) -> int:
    time.sleep(0.005)
    return sample


@found_in_one_of_three
def test_planted_sleeps_are_found_again() -> None:
    """Each step takes two batches of one sample, 20 ms in the source and 10 ms in the transform, and computes 30 ms."""
    limit = Limit()
    with LocalBatches(Slow(), size=1, transform=slow, collate="numpy") as batches:
        supply = Supply(batches, 2)
        for step in range(12):
            begun = time.perf_counter()
            assert len(supply.take(step)) == 2
            assert 0.03 <= sum(supply.waits.values()) <= supply.seconds
            time.sleep(0.03)
            seconds = time.perf_counter() - begun
            limit.update(
                StepEnded(
                    step=step + 1,
                    loss=1.0,
                    learning_rate=0.1,
                    grad_norm=None,
                    samples=2,
                    tokens=2,
                    seconds=seconds,
                    data_seconds=supply.seconds,
                    waits=supply.waits,
                    ready=supply.ready,
                )
            )
    assert limit.percentages["computing"] == pytest.approx(50, abs=10)
    assert limit.percentages["source"] == pytest.approx(33, abs=8)
    assert limit.percentages["transform"] == pytest.approx(17, abs=6)
    assert sum(limit.percentages.values()) == 100 and limit.sentence.startswith("Reading the samples")


def test_a_stream_that_measures_nothing_is_taken_from_all_the_same() -> None:
    supply = Supply([1, 2, 3], 2)
    assert supply.take(0) == [1, 2] and supply.waits == {} and supply.ready is None and supply.received_bytes == 0
    with pytest.raises(DataError, match="came to an end after step 1"):
        supply.take(1)
