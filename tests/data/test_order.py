from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.data.order import MAX_SAMPLES, epoch_order, indices_at
from trainfleet.errors import DataError


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    order = indices_at(np.arange(n), num_samples=n, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    assert (np.sort(order) == np.arange(n)).all()


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, MAX_SAMPLES), data=st.data())
def test_positions_of_any_size_of_dataset_stay_apart_and_inside(n, data):
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True))
    order = indices_at(positions, num_samples=n, seed=1)
    assert len(set(order.tolist())) == len(positions)
    assert order.min() >= 0 and order.max() < n


@given(n=st.integers(40, 2000), seed=st.integers(0, 9), epoch=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_epochs_and_seeds_differ(n, seed, epoch):
    def order(seed, epoch):
        return indices_at(np.arange(n), num_samples=n, seed=seed, epoch=epoch).tolist()

    assert order(seed, epoch) != order(seed, epoch + 1)
    assert order(seed, epoch) != order(seed + 1, epoch)
    assert order(seed, epoch) != list(range(n))


@given(n=st.integers(1, 500), data=st.data())
@settings(max_examples=50, deadline=None)
def test_one_position_alone_gets_the_sample_it_gets_among_all(n, data):
    position = data.draw(st.integers(0, n - 1))
    whole = indices_at(np.arange(n), num_samples=n, seed=5, epoch=2)
    assert indices_at([position], num_samples=n, seed=5, epoch=2).tolist() == [whole[position]]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_few_samples_are_equally_likely(n):
    epochs = 4000
    seen = Counter(tuple(indices_at(np.arange(n), num_samples=n, seed=1, epoch=e).tolist()) for e in range(epochs))
    expected = epochs / math.factorial(n)
    chi_square = sum((seen[p] - expected) ** 2 / expected for p in itertools.permutations(range(n)))
    freedom = math.factorial(n) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_the_order_is_the_same_for_ever():
    """A checkpoint holds a position in this order: were it to change, old positions would mean other samples."""
    assert indices_at(np.arange(10), num_samples=10, seed=0, epoch=0).tolist() == FIRST_ORDER


FIRST_ORDER = [8, 9, 0, 4, 6, 1, 5, 2, 7, 3]


def test_without_shuffle_the_order_is_that_of_the_source():
    assert list(epoch_order(num_samples=10_000, shuffle=False)) == list(range(10_000))


def test_epoch_order_is_indices_at_block_by_block():
    whole = indices_at(np.arange(20_000), num_samples=20_000, seed=3, epoch=1)
    assert list(epoch_order(num_samples=20_000, seed=3, epoch=1)) == whole.tolist()


def test_positions_outside_the_epoch_are_refused():
    with pytest.raises(IndexError, match="10 samples"):
        indices_at([3, 10], num_samples=10)
    with pytest.raises(DataError, match="2\\^48"):
        indices_at([0], num_samples=MAX_SAMPLES + 1)
