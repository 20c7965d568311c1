from __future__ import annotations

import functools
import random

import numpy as np
import pytest

from trainfleet.data.loader import LocalBatches
from trainfleet.data.order import Blocks
from trainfleet.data.sampler import Span
from trainfleet.data.samples import STAND_IN_TRIES, IndexedMaker, Transform, sample_rng, takes_rng
from trainfleet.errors import DataError


class Flip:
    def __call__(self, sample, rng):
        return sample


@pytest.mark.parametrize(
    ("transform", "takes"),
    [
        (None, False),
        (lambda sample: sample, False),
        (lambda sample, rng: sample, True),
        (lambda sample, generator: sample, True),
        (lambda sample, rng=None: sample, True),
        (lambda sample, size=3: sample, False),
        (lambda *samples: samples, False),
        (functools.partial(lambda size, sample: sample, 3), False),
        (Flip(), True),
        (np.log, False),
    ],
)
def test_a_transform_gets_a_generator_if_its_second_argument_must_be_given(transform, takes):
    assert takes_rng(transform) is takes


def test_the_generator_of_a_sample_depends_on_seed_epoch_and_index_alone():
    draws = {sample_rng(seed, epoch, index).random() for seed in (-1, 0, 1) for epoch in (0, 1) for index in (0, 1)}
    assert len(draws) == 12
    assert sample_rng(2**70, 3, 4).random() == sample_rng(2**70, 3, 4).random()


def test_our_own_sources_alone_cost_no_seeding(monkeypatch):
    from trainfleet.data.tabular import NumpyArrays

    source = NumpyArrays(arrays={"x": np.arange(4)})
    before = random.getstate()
    Transform(None, 0, source).seed_globals(0, 0)
    assert random.getstate() == before
    Transform(lambda sample: sample, 0, source).seed_globals(0, 0)
    assert random.getstate() != before


def maker(source, **settings):
    fixed = {"size": 4, "rank": 0, "world_size": 1, "shuffle": False, "short": "drop", "bad": "skip", "collate": None}
    return IndexedMaker(source=source, transform=Transform(None, 0, source), **(fixed | settings))


class Half:
    """The first 4 are bad, and then as many as are asked for."""

    def __init__(self, num_bad):
        self.num_bad = num_bad

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        if index < self.num_bad:
            raise OSError("unreadable")
        return index


def test_slots_of_a_wholly_bad_batch_are_filled_with_what_follows():
    seen = []
    made = maker(Half(50)).make(Span(0, 0, 4), progress=seen.append, poison=())
    batch, weights = made.batch
    assert batch.tolist() == [50] * 4 and weights.tolist() == [0] * 4
    assert [index for index, _ in made.skipped] == seen == [0, 1, 2, 3]
    with pytest.raises(DataError, match=f"the {STAND_IN_TRIES} after it are all bad; the first: sample 0: OSError"):
        maker(Half(500)).make(Span(0, 0, 4), progress=seen.append, poison=())


def test_a_repeated_sample_that_is_bad_is_not_counted_twice():
    class Bad(Half):
        def __len__(self):
            return 6

    made = maker(Bad(1), short="pad").make(Span(0, 4, 6), progress=lambda index: None, poison=())
    batch, weights = made.batch
    assert made.skipped == () and weights.tolist() == [1, 1, 0, 0] and batch.tolist() == [4, 5, 4, 1]


class Blocky:
    """Samples in blocks of 5, which says what it was told."""

    def __init__(self, count=40):
        self.blocks = Blocks((5,) * (count // 5), 2)
        self.told: list[tuple[list[int], list[int]]] = []

    def __len__(self):
        return sum(self.blocks.sizes)

    def __getitem__(self, index):
        self.still_there()
        return {"index": index}

    def expect(self, present, ahead):
        self.told.append((present, ahead))


def test_a_source_in_blocks_is_read_window_by_window_and_told_what_comes():
    source, steps = Blocky(), []
    maker = LocalBatches(source, size=10, seed=1).maker
    windows = []
    for begin in range(0, 40, 10):
        made = maker.make(Span(0, begin, begin + 10), progress=steps.append, poison=())
        windows.append({index // 5 for index in made.batch["index"].tolist()})
    assert all(len(window) == 2 for window in windows) and set().union(*windows) == set(range(8))
    assert [set(present) for present, _ in source.told] == windows
    assert source.told[0][1][0] in windows[1], "the next window is foretold"
    assert steps.count(-1) == 40, "waiting is progress"
