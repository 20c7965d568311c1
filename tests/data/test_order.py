from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.data.order import MAX_SAMPLES, Blocks, epoch_order, indices_at
from trainfleet.errors import DataError


@settings(max_examples=150)
@given(n=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    order = indices_at(np.arange(n), num_samples=n, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    assert (np.sort(order) == np.arange(n)).all()


@settings(max_examples=50)
@given(n=st.integers(1, MAX_SAMPLES), data=st.data())
def test_positions_of_any_size_of_dataset_stay_apart_and_inside(n, data):
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True))
    order = indices_at(positions, num_samples=n, seed=1)
    assert len(set(order.tolist())) == len(positions)
    assert order.min() >= 0 and order.max() < n


@given(n=st.integers(40, 2000), seed=st.integers(0, 9), epoch=st.integers(0, 99))
@settings(max_examples=50)
def test_epochs_and_seeds_differ(n, seed, epoch):
    def order(seed, epoch):
        return indices_at(np.arange(n), num_samples=n, seed=seed, epoch=epoch).tolist()

    assert order(seed, epoch) != order(seed, epoch + 1)
    assert order(seed, epoch) != order(seed + 1, epoch)
    assert order(seed, epoch) != list(range(n))


@given(n=st.integers(1, 500), data=st.data())
@settings(max_examples=50)
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


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@settings(max_examples=300)
@given(sizes=SIZES, window=st.integers(1, 45), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6))
def test_every_epoch_in_blocks_is_a_permutation(sizes, window, seed, epoch):
    n = sum(sizes)
    order = indices_at(np.arange(n), num_samples=n, seed=seed, epoch=epoch, blocks=Blocks(tuple(sizes), window))
    assert order.dtype == np.int64
    assert (np.sort(order) == np.arange(n)).all()


@settings(max_examples=100)
@given(sizes=SIZES, window=st.integers(1, 12), seed=st.integers(0, 99), data=st.data())
def test_an_order_in_blocks_is_a_function_of_each_position_alone(sizes, window, seed, data):
    n, blocks = sum(sizes), Blocks(tuple(sizes), window)
    some = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    whole = indices_at(np.arange(n), num_samples=n, seed=seed, epoch=2, blocks=blocks)
    again = Blocks(tuple(sizes), window)
    assert indices_at(some, num_samples=n, seed=seed, epoch=2, blocks=again).tolist() == whole[some].tolist()


@settings(max_examples=100)
@given(sizes=SIZES, window=st.integers(1, 12), seed=st.integers(0, 99))
def test_no_more_than_a_window_of_blocks_is_in_use_and_those_that_come_are_said_before(sizes, window, seed):
    n, blocks = sum(sizes), Blocks(tuple(sizes), window)
    block_of = np.repeat(np.arange(len(sizes)), sizes)
    order = indices_at(np.arange(n), num_samples=n, seed=seed, epoch=0, blocks=blocks).tolist()
    for position, index in enumerate(order):
        present, _ = blocks.coming(position, seed=seed, epoch=0)
        assert len(present) <= window and block_of[index] in present
    if not blocks.whole:
        assert blocks.coming(n - 1, seed=seed, epoch=0)[1][0] in blocks.coming(0, seed=seed, epoch=1)[0]


def test_the_next_window_is_foretold_block_by_block_as_this_one_is_used_up():
    blocks = Blocks((10,) * 12, 4)
    ahead = [len(blocks.coming(position, seed=3)[1]) for position in range(40)]
    assert ahead == [1 + position // 10 for position in range(40)]
    assert blocks.coming(39, seed=3)[1] == blocks.coming(40, seed=3)[0]
    assert blocks.coming(25, shuffle=False) == ([2], [3])
    assert blocks.coming(119, shuffle=False) == ([11], [0])


def test_windows_as_large_as_the_whole_are_the_order_without_blocks():
    plain = indices_at(np.arange(100), num_samples=100, seed=4, epoch=1)
    whole = indices_at(np.arange(100), num_samples=100, seed=4, epoch=1, blocks=Blocks((30, 30, 40), 3))
    assert whole.tolist() == plain.tolist() and Blocks((30, 30, 40), 3).coming(7) == ([0, 1, 2], [])
    assert list(epoch_order(num_samples=100, shuffle=False, blocks=Blocks((50, 50), 1))) == list(range(100))


def test_within_a_window_every_sample_comes_anywhere_and_windows_hold_any_blocks():
    """The place of a sample within its window, and the window of a block, over many epochs: even (chi-square)."""
    blocks, epochs = Blocks((8,) * 6, 2), 1000
    places, windows = np.zeros(16), np.zeros(3)
    for epoch in range(epochs):
        place = indices_at(np.arange(48), num_samples=48, seed=1, epoch=epoch, blocks=blocks).tolist().index(5)
        places[place % 16] += 1
        windows[place // 16] += 1
    for counts in (places, windows):
        freedom = len(counts) - 1
        expected = epochs / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom)


def test_the_order_in_blocks_is_the_same_for_ever():
    order = indices_at(np.arange(12), num_samples=12, blocks=Blocks((3, 2, 4, 3), 2))
    assert order.tolist() == FIRST_ORDER_IN_BLOCKS


FIRST_ORDER_IN_BLOCKS = [0, 10, 1, 9, 2, 11, 8, 4, 7, 5, 6, 3]


def test_blocks_that_do_not_hold_the_dataset_are_refused():
    with pytest.raises(DataError, match="hold 9 of them"):
        indices_at([0], num_samples=10, blocks=Blocks((4, 5), 1))
    with pytest.raises(DataError, match="window of 0 blocks"):
        Blocks((4, 5), 0)
    with pytest.raises(DataError, match="blocks of 0 samples"):
        Blocks((4, 0, 5), 1)
