"""Every stream takes its batches from a crew, in the order of its plan, whoever makes them and however they fail."""

from __future__ import annotations

import pytest

from trainfleet.data.batches import IndexedBatches
from trainfleet.data.samples import Made
from trainfleet.errors import DataError


class Asked:
    """A crew that opens a pool which makes of a span its positions, and fails where told."""

    depth = 3

    def __init__(self):
        self.fails, self.opened, self.tasks, self.forgotten = set(), 0, {}, 0

    def open(self):
        self.opened += 1
        return self

    def submit(self, task, span):
        self.tasks[task] = span

    def receive(self, task):
        span = self.tasks.pop(task)
        if span.begin in self.fails:
            raise DataError(f"position {span.begin} is rotten")
        return Made([span.epoch, *range(span.begin, span.end)])

    def forget(self):
        self.forgotten += 1
        self.tasks.clear()

    def close(self):
        self.tasks.clear()

    pids = ()


def stream(crew, **settings):
    common = {"num_samples": 10, "size": 2, "rank": 0, "world_size": 2, "seed": 0, "shuffle": False, "short": "drop"}
    common |= {"epochs": None, "name": "ten", "pin": False, "as_numpy": True, "on_skip": None}
    return IndexedBatches(crew, **(common | settings))


def test_spans_are_asked_for_ahead_and_taken_in_order():
    crew = Asked()
    batches = stream(crew)
    assert [next(batches) for _ in range(3)] == [[0, 0, 1, 2, 3], [0, 4, 5, 6, 7], [1, 0, 1, 2, 3]]
    assert len(crew.tasks) == crew.depth and batches.dropped == 2
    assert (batches.epoch, batches.position, batches.batches_per_epoch) == (1, 4, 2)


def test_a_span_that_failed_is_asked_for_again():
    crew = Asked()
    crew.fails.add(4)
    batches = stream(crew)
    next(batches)
    for _ in range(2):
        with pytest.raises(DataError, match="position 4 is rotten"):
            next(batches)
    crew.fails.clear()
    assert next(batches) == [0, 4, 5, 6, 7] and crew.forgotten == 2


def test_a_state_goes_on_at_its_place_with_its_seed():
    batches = stream(Asked(), seed=3)
    next(batches)
    crew = Asked()
    other = stream(crew, seed=4)
    next(other)
    other.load_state_dict(batches.state_dict())
    assert next(other) == [0, 4, 5, 6, 7] and other.seed == 3
    assert crew.opened == 2, "a pool knows the seed that it was opened with"


def test_the_last_epoch_ends_the_stream_and_rewind_begins_it_again():
    batches = stream(Asked(), epochs=1)
    assert len(list(batches)) == 2
    batches.rewind()
    assert next(batches) == [0, 0, 1, 2, 3]
    batches.close()
    with pytest.raises(DataError, match="closed"):
        next(batches)
