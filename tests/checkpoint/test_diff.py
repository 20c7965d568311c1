"""Two checkpoints differ where a value, a shape, a dtype or a bit differs, and in nothing else."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from held import Held

from trainfleet.checkpoint import Checkpointer
from trainfleet.checkpoint.catalog import read_step
from trainfleet.checkpoint.diff import differences
from trainfleet.checkpoint.whole import Whole
from trainfleet.comm.threads import run_ranks
from trainfleet.state import PerRank, Setting, ShardedArray
from trainfleet.store import MemoryStore


def saved(ranks=1, **value):
    store = MemoryStore()
    whole = np.asarray(value.pop("w", np.arange(12.0)))

    def save(group):
        places = np.array_split(np.arange(len(whole)), ranks)[group.rank]
        piece = ShardedArray(name="w", global_shape=whole.shape, offsets=(int(places[0]),), local=whole[places])
        with Checkpointer(store, group=group) as checkpointer:
            checkpointer.save(1, m=Held(w=piece, **value))

    run_ranks(ranks, save)
    return Whole(store, read_step(store, 1)[1])


def found(first, second, state=None):
    return {each.path: each for each in differences(first, second, state)}


def test_equal_ones_differ_in_nothing_however_they_were_cut():
    more = {"own": PerRank(np.arange(3)), "mode": Setting("bf16"), "list": [1, ("a", None)], "nan": np.array(math.nan)}
    assert found(saved(1, **more), saved(3, **more)) == {}


def test_elements_that_differ_are_counted_and_the_largest_difference_is_told():
    other = np.arange(12.0)
    other[3] += 0.5
    other[7] -= 2
    (only,) = found(saved(2), saved(3, w=other)).values()
    assert (only.path, only.largest, only.elements) == ("m/w", 2.0, 2)
    assert only.what == "2 of 12 elements differ, by 2 at most"


def test_a_sign_of_zero_is_a_difference_of_one_bit():
    (only,) = found(saved(w=np.zeros(4)), saved(w=np.array([0.0, -0.0, 0.0, 0.0]))).values()
    assert only.largest == 0.0 and only.elements == 1


@pytest.mark.parametrize(
    ("first", "second", "path", "what"),
    [
        ({"w": np.arange(3.0)}, {"w": np.arange(4.0)}, "m/w", "of shape (3,) in the first and (4,) in the second"),
        (
            {"w": np.arange(3.0)},
            {"w": np.arange(3.0, dtype=np.float32)},
            "m/w",
            "float64 in the first and float32 in the second; 0 of 3 elements differ, by 0 at most",
        ),
        ({"n": 1}, {}, "m/n", "only in the first"),
        ({}, {"n": 1}, "m/n", "only in the second"),
        ({"n": 1}, {"n": 1.0}, "m/n", "1 in the first and 1.0 in the second"),
        (
            {"mode": Setting("fp32")},
            {"mode": Setting("bf16")},
            "m/mode",
            "'fp32' in the first and 'bf16' in the second",
        ),
        ({"x": [1, 2]}, {"x": [1, 3]}, "m/x/1", "2 in the first and 3 in the second"),
        ({"x": np.arange(2)}, {"x": 5}, "m/x", "an array of int64 [2] in the first and 5 in the second"),
        ({"own": PerRank(np.zeros(2))}, {"own": PerRank(np.ones(2))}, "m/own", "2 of 2 elements differ, by 1 at most"),
    ],
)
def test_every_kind_of_difference_has_its_words(first, second, path, what):
    (only,) = found(saved(**first), saved(**second)).values()
    assert (only.path, only.what) == (path, what)


def test_one_state_can_be_chosen():
    assert found(saved(n=1), saved(n=2), state="other") == {}
    assert set(found(saved(n=1), saved(n=2), state="m")) == {"m/n"}


def test_what_each_rank_has_of_its_own_is_compared_rank_by_rank():
    def own(change):
        store = MemoryStore()

        def save(group):
            value = PerRank({"rng": np.full(2, group.rank + (change if group.rank == 1 else 0)), "n": [group.rank]})
            with Checkpointer(store, group=group) as checkpointer:
                checkpointer.save(1, m=Held(own=value, n=1))

        run_ranks(3, save)
        return Whole(store, read_step(store, 1)[1])

    assert list(differences(own(0), own(0))) == []
    (only,) = differences(own(0), own(5))
    assert (only.path, only.rank, only.largest) == ("m/own/rng", 1, 5.0)


def test_large_whole_numbers_are_compared_exactly():
    (only,) = found(saved(w=np.array([2**60, -(2**63)])), saved(w=np.array([2**60 + 1, 2**63 - 1]))).values()
    assert only.elements == 2 and only.largest == float(2**64 - 1)


def test_memory_is_that_of_two_arrays():
    first, second = saved(w=np.zeros(4_000_000, "f4")), saved(w=np.ones(4_000_000, "f4"))  # 16 MB each
    tracemalloc.start()
    (only,) = differences(first, second)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert only.elements == 4_000_000 and peak < 2 * 16_000_000 + 8_000_000
