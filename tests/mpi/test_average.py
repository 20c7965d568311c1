"""Every rank gets the mean, in whatever bucket, dtype and code it travels; the oracle is NumPy on all ranks' arrays."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from trainfleet.codec import BFloat16, Float16
from trainfleet.comm.threads import run_ranks
from trainfleet.errors import PeerError, PlanError
from trainfleet.mpi.average import BUCKET_BYTES, GradientAverage, average_gradients, collect

SHAPES = [(2, 3), (), (BUCKET_BYTES // 4 + 1,), (5,), (0, 4), (BUCKET_BYTES // 16,)]


def grads_of(rank, dtype="float32"):
    draw = np.random.default_rng(rank)
    return {f"{index}": np.asarray(draw.normal(size=shape), dtype) for index, shape in enumerate(SHAPES)}


def averaged(group, codec, dtype):
    return average_gradients(grads_of(group.rank, dtype), group, codec)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_rank_gets_the_mean(run, size, dtype):
    all_grads = [grads_of(rank, dtype) for rank in range(size)]
    for means in run(size, averaged, None, dtype):
        assert list(means) == list(all_grads[0])
        for name, mean in means.items():
            assert mean.dtype == dtype and mean.shape == all_grads[0][name].shape
            np.testing.assert_allclose(mean, sum(g[name] for g in all_grads) / size, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codec", [Float16(), BFloat16()], ids=["float16", "bfloat16"])
def test_casts_are_added_up_in_float32_and_rounded_twice_in_all(run, codec):
    """Once by each rank before it sends, once after the sum."""
    coded = [{name: codec.decode(codec.encode(g)) for name, g in grads_of(rank).items()} for rank in range(2)]
    for means in run(2, averaged, codec, "float32"):
        for name, mean in means.items():
            expected = codec.decode(codec.encode((coded[0][name] + coded[1][name]) / 2))
            np.testing.assert_array_equal(mean, expected)


@dataclass(frozen=True)
class Largest:
    """The one largest number and its place: two parts of unlike kind, which no sum can join."""

    def encode(self, array):
        at = np.array([np.abs(array).argmax()])
        return at, array[at], np.array([array.size])

    def decode(self, parts):
        at, value, size = parts
        array = np.zeros(int(size[0]), np.float32)
        array[at] = value
        return array


def largest(group):
    gradient = np.array([[1.0, -5.0 + group.rank], [2.0, 0.0]], np.float32)
    return average_gradients([gradient], group, Largest())[0].tolist()


def test_codes_that_cannot_be_added_are_decoded_one_by_one(run):
    assert run(2, largest) == [[[0.0, -4.5], [0.0, 0.0]]] * 2


def weighted(group):
    return average_gradients([np.array([3.0 * (group.rank + 1)])], group, weight=2 * group.rank + 1)[0].tolist()


def test_with_weights_it_is_the_sum_over_the_sum_of_weights(run):
    assert run(3, weighted) == [[18.0 / 9.0]] * 3


def one_by_one(group):
    average = GradientAverage(group, bucket_bytes=64)
    for round_ in range(2):
        for name in range(9):
            average.add(name, np.full(4, float(group.rank + name + round_)))
        means = average.finish()
    return [means[name][0] for name in range(9)]


def test_gradients_may_come_one_by_one_and_again(run):
    assert run(2, one_by_one) == [[name + 1.5 for name in range(9)]] * 2


def collected(group):
    parts = collect(np.full((group.rank + 1, 2), group.rank), group, to=1)
    return None if parts is None else [part.tolist() for part in parts]


def test_collected_arrays_are_on_one_rank_only(run):
    assert run(3, collected) == [None, [[[0, 0]], [[1, 1]] * 2, [[2, 2]] * 3], None]


def collected_by_name(group):
    parts = collect({"a": np.full(2, group.rank), "b": np.zeros(group.rank)}, group)
    return None if parts is None else [{name: array.tolist() for name, array in each.items()} for each in parts]


def collected_unlike(group):
    return collect({"a": np.zeros(2)} if group.rank else {"b": np.zeros(2)}, group)


def test_mappings_are_collected_by_name_and_other_names_are_refused(run):
    everyones, nothing = run(2, collected_by_name)
    assert nothing is None and [each["a"] for each in everyones] == [[0, 0], [1, 1]]
    assert [len(each["b"]) for each in everyones] == [0, 1]
    with pytest.raises(PlanError, match="Rank 1 collects a, and rank 0 b"):
        run(2, collected_unlike)


F, D = np.float32, np.float64
UNLIKE = {
    "count": ([np.ones(2, F)], [np.ones(2, F), np.ones(3, F)], "number 1 is none on rank 0 of 2, '1' float32 (3,)"),
    "shape": (
        [np.ones(4, F)],
        [np.ones(5, F)],
        "'0' float32 (4,) on rank 0 of 2, '0' float32 (5,) on",
    ),
    "order of equal bytes": ([np.ones(2), np.ones(3)], [np.ones(3), np.ones(2)], "'0' float64 (2,) on rank 0"),
    "dtype": ([np.ones(2, F)], [np.ones(2, D)], "'0' float64 (2,) on rank 1 (1 and 1 arrays in all)"),
    "name": ({"a": np.ones(2)}, {"b": np.ones(2)}, "'a' float64 (2,) on rank 0 of 2, 'b'"),
}


def unlike(group, kind, one_by_one):
    grads = UNLIKE[kind][group.rank]
    with pytest.raises(PeerError) as caught:
        if one_by_one:
            average = GradientAverage(group)
            for name, gradient in grads.items() if isinstance(grads, dict) else enumerate(grads):
                average.add(name, gradient)
            average.finish()
        else:
            average_gradients(grads, group)
    return str(caught.value)


@pytest.mark.parametrize("kind", UNLIKE)
def test_every_rank_hears_which_gradient_is_not_alike(run, kind):
    for sentence in run(2, unlike, kind, False):
        assert sentence.startswith("Ranks bring unlike arrays: ") and UNLIKE[kind][2] in sentence


def unlike_one_by_one(group):
    return unlike(group.split(0), "order of equal bytes", True), unlike(group.split(0), "count", True)


def test_gradients_one_by_one_are_compared_at_the_end_or_refused_by_the_group(run):
    for equal_bytes, more_bytes in run(2, unlike_one_by_one):
        assert "number 0 is '0' float64 (2,) on rank 0" in equal_bytes
        assert "all_reduce_" in more_bytes  # the bucket itself is not alike


def test_integers_are_refused_by_name():
    with pytest.raises(TypeError, match="mean of int64"):
        run_ranks(1, lambda group: average_gradients([np.arange(3)], group))


def test_nothing_here_imports_torch():
    program = """
import sys
import trainfleet.mpi
from trainfleet.comm.mpi_group import MpiGroup
heavy = [name for name in ("torch", "jax", "cupy", "keras", "mpi4py") if name in sys.modules]
sys.exit(str(heavy) if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
