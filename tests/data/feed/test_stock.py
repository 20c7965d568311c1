"""A feeder makes what LocalBatches makes, under any terms, and says what its samples are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from data.feed.made import Numbers, local, same

from trainfleet.data.feed.stock import Stock, digest_of
from trainfleet.data.feed.terms import Terms, Unit
from trainfleet.data.order import Blocks
from trainfleet.data.split import Part
from trainfleet.errors import DataError

TERMS = Terms(stream="training", size=8, rank=0, world_size=1, seed=3, shuffle=True, short="drop", bad="raise")


def made(stock, unit):
    return stock.make(unit, progress=lambda index: None, poison=())


@pytest.mark.parametrize("change", [{}, {"size": 5, "rank": 1, "world_size": 3}, {"seed": 9}, {"shuffle": False}])
def test_a_unit_is_the_batch_of_a_local_stream_with_these_terms(change):
    stock, terms = Stock({"training": local()}), replace(TERMS, **change)
    plain = local(size=terms.size, rank=terms.rank, world_size=terms.world_size, seed=terms.seed, shuffle=terms.shuffle)
    step = terms.size * terms.world_size
    for begin in range(0, 3 * step, step):
        assert same(made(stock, Unit(0, begin, begin + step, terms)).batch, next(plain))


def test_it_offers_what_its_streams_are():
    offers = Stock({"training": local(), "evaluation": local(Numbers(20), shuffle=False)}).offers()
    assert (offers["training"].samples, offers["training"].size, offers["training"].seed) == (100, 8, 3)
    assert (offers["evaluation"].samples, offers["evaluation"].shuffle) == (20, False)
    assert "Numbers" in offers["training"].source


@pytest.mark.parametrize(
    ("unit", "word"),
    [
        (Unit(0, 96, 104, TERMS), "among 100 samples"),
        (Unit(0, 0, 9, TERMS), "no micro-batch"),
        (Unit(0, 0, 8, replace(TERMS, stream="other")), "no stream 'other'"),
        (Unit(0, 0, 8, replace(TERMS, world_size=50)), "fewer than one micro-batch"),
    ],
)
def test_what_it_does_not_have_is_refused(unit, word):
    with pytest.raises(DataError, match=word):
        Stock({"training": local()}).check(unit)


def other_jitter(sample, rng):
    return {**sample, "noise": rng.standard_normal(4, np.float32)}


def test_feeders_are_told_apart_by_samples_and_by_what_is_done_to_them():
    ours = digest_of(local().maker)
    assert digest_of(local(Numbers()).maker) == ours
    assert digest_of(local(size=4, seed=99).maker) == ours, "the terms are the trainer's"
    others = [local(Numbers(99)), local(Numbers(shift=1)), local(Numbers(bad=[0])), local(transform=other_jitter)]
    others += [local(transform=None), local(collate=list)]
    digests = [digest_of(stream.maker) for stream in others]
    assert ours not in digests and len(set(digests)) == len(digests)


def test_an_object_is_known_by_its_words_not_by_its_place_in_memory():
    class Twice:
        def __call__(self, sample):
            return sample

    assert digest_of(local(transform=Twice()).maker) == digest_of(local(transform=Twice()).maker)


def test_feeders_whose_blocks_or_windows_differ_are_told_apart():
    digests = set()
    for blocks in [None, Blocks((50, 50), 1), Blocks((60, 40), 1), Blocks((50, 50), 2)]:
        source = Numbers()
        source.blocks = blocks
        digests.add(digest_of(local(source).maker))
    assert len(digests) == 4


def test_feeders_that_hold_out_something_else_are_told_apart():
    source = Numbers()
    parts = [None] + [
        Part(source, fraction, seed=seed, held_out=held_out)
        for fraction, seed, held_out in ((0.1, 0, False), (0.1, 1, False), (0.1, 0, True), (0.2, 0, False))
    ]
    digests = [digest_of(local(source, part=part).maker) for part in parts]
    assert len(set(digests)) == len(parts)
    assert digest_of(local(source, part=Part(source, 0.1, held_out=False)).maker) == digests[1]
