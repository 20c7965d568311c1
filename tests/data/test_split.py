"""What is held out and the rest are the whole source, once each, whoever asks and in whatever pieces."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.data.order import Blocks
from trainfleet.data.split import Part, _Strata
from trainfleet.errors import DataError

FRACTIONS = st.floats(0.001, 0.999)


def both(source, fraction, seed=0):
    parts = [Part(source, fraction, seed=seed, held_out=held_out) for held_out in (True, False)]
    return parts, [part.in_source(np.arange(len(part))).tolist() for part in parts]


@given(st.integers(2, 300), FRACTIONS, st.integers(0, 1 << 40))
def test_both_parts_are_the_whole_in_its_order(n, fraction, seed):
    (held_out, _), (taken, rest) = both(range(n), fraction, seed)
    assert sorted(taken + rest) == list(range(n)) and taken == sorted(taken) and rest == sorted(rest)
    assert abs(len(held_out) - n * fraction) <= 1 and len(held_out) == len(taken)


@given(st.integers(2, 300), FRACTIONS, st.data())
def test_a_place_does_not_depend_on_what_else_is_asked_for(n, fraction, data):
    (held_out, rest), whole = both(range(n), fraction, 7)
    for part, order in zip((held_out, rest), whole):
        places = np.array(data.draw(st.lists(st.integers(0, len(part) - 1), min_size=1, max_size=9)))
        assert pickle.loads(pickle.dumps(part)).in_source(places).tolist() == [order[place] for place in places]


def test_what_is_held_out_comes_from_everywhere_and_depends_on_the_seed():
    (_, _), (taken, _) = both(range(10_000), 0.1)
    counts = np.histogram(taken, bins=10, range=(0, 10_000))[0]
    assert counts.tolist() == [100] * 10
    others = [set(both(range(10_000), 0.1, seed)[1][0]) for seed in range(1, 6)]
    assert all(50 < len(other & set(taken)) < 160 for other in others), "a tenth is the same by chance"
    within = np.array(taken) - np.arange(1000) * 10
    assert np.histogram(within, bins=10)[0].min() > 60, "each place of a stretch is as likely"


class Vast:
    def __len__(self):
        return 1 << 45

    def __getitem__(self, index):
        return index


def test_a_split_of_any_length_is_computed_and_not_stored():
    held_out, rest = (Part(Vast(), 0.3, held_out=held_out) for held_out in (True, False))
    assert len(held_out) + len(rest) == 1 << 45
    places = np.array([0, 1, 10**12, len(rest) - 1])
    found = rest.in_source(places)
    strata = _Strata(1 << 45, 0.3, 0)
    assert strata.before(found, False).tolist() == places.tolist() and found[-1] < 1 << 45
    taken = held_out.in_source(np.arange(10**11, 10**11 + 100))
    assert np.diff(taken).min() >= 1 and strata.before(taken, True).tolist() == list(range(10**11, 10**11 + 100))


class Shards:
    def __init__(self, sizes, window=2):
        self.blocks = Blocks(tuple(sizes), window)

    def __len__(self):
        return sum(self.blocks.sizes)

    def __getitem__(self, index):
        return index


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), FRACTIONS, st.integers(0, 99))
def test_a_source_in_blocks_is_split_too(sizes, fraction, seed):
    source = Shards(sizes)
    if len(source) < 2:
        return
    parts, (taken, rest) = both(source, fraction, seed)
    assert sorted(taken + rest) == list(range(len(source)))
    ends = np.cumsum(sizes)
    for part, indices in zip(parts, (taken, rest)):
        assert part.blocks.window == 2 and sum(part.blocks.sizes) == len(part) == len(indices)
        # Each of its blocks is what it holds of the block of the source that it names.
        at = np.repeat(np.arange(len(part.blocks.sizes)), part.blocks.sizes).tolist()
        assert part.blocks_in_source(at) == np.searchsorted(ends, indices, side="right").tolist()


def test_whole_blocks_are_held_out_where_the_fraction_is_one():
    (held_out, rest), (taken, _) = both(Shards([10] * 20), 0.1)
    assert held_out.blocks.sizes == (10, 10) and len(rest.blocks.sizes) == 18
    assert {index // 10 for index in taken} == set(held_out.blocks_in_source([0, 1]))
    (held_out, rest), _ = both(Shards([100] * 3), 0.1)
    assert len(held_out) == 30 and rest.blocks.sizes == (90, 90, 90), "a third would be far too much"


@pytest.mark.parametrize(("n", "fraction"), [(100, 0.0), (100, 1.0), (100, -0.1), (1, 0.5), (0, 0.5), (5, np.nan)])
def test_what_leaves_a_part_empty_is_refused(n, fraction):
    with pytest.raises(DataError):
        Part(range(n), fraction, held_out=True)
