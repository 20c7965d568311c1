"""What every Group and Links promises, over threads, torch and MPI alike; the oracle is NumPy on all ranks' arrays."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.comm.group import Group, Links, Work
from trainfleet.comm.threads import run_ranks


def on_torch(function, *args):
    import torch.distributed as dist

    from trainfleet.comm.torch_group import TorchGroup

    return function(TorchGroup(dist.group.WORLD), *args)


@pytest.fixture(params=["threads", "torch", "mpi"])
def run(request):
    """`run(size, function, *args)` calls `function(group, *args)` on each rank."""
    if request.param == "threads":
        return lambda size, function, *args: run_ranks(size, lambda group: function(group, *args))
    if request.param == "mpi":
        return request.getfixturevalue("mpi_ranks")
    ranks = request.getfixturevalue("ranks")
    return lambda size, function, *args: ranks(size, on_torch, function, *args)


def array_of(rank: int, dtype: str = "float64", shape: tuple[int, ...] = (4, 3)) -> np.ndarray:
    return (np.random.default_rng(rank).normal(size=shape) * 100).astype(dtype)


def reduced(group, op, dtype):
    array = array_of(group.rank, dtype)
    group.all_reduce_(array, op).wait()
    return array


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, dtype) for op in ("sum", "mean", "max", "min") for dtype in ("float64", "float32")]
    + [(op, "int64") for op in ("sum", "max", "min")],
)
def test_all_reduce_gives_every_rank_the_same_reduction(run, size, op, dtype):
    expected = getattr(np, op)(np.stack([array_of(rank, dtype) for rank in range(size)]), axis=0)
    results = run(size, reduced, op, dtype)
    for result in results:
        assert result.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(result, results[0])
        np.testing.assert_allclose(result, expected, rtol=1e-5 if dtype == "float32" else 1e-12)


def refused(group, op, dtype):
    with pytest.raises((TypeError, ValueError)) as caught:
        reduced(group, op, dtype)
    return str(caught.value)


def test_a_mean_of_integers_and_an_unknown_reduction_are_refused(run):
    assert "reduce by 'sum'" in run(1, refused, "mean", "int64")[0]
    assert "use one of sum, mean, max, min" in run(1, refused, "median", "float64")[0]


def overlapped(group):
    arrays = [np.full(5, float(group.rank + number)) for number in range(6)]
    works = [group.all_reduce_(array) for array in arrays]
    for work in reversed(works):
        work.wait()
        work.wait()  # a second time changes nothing
    return [array[0] for array in arrays]


def test_several_collectives_may_be_under_way_and_awaited_in_any_order(run):
    assert run(3, overlapped) == [[3.0 + 3 * number for number in range(6)]] * 3


def broadcast(group, source):
    array = array_of(group.rank)
    group.broadcast_(array, source).wait()
    return array


def test_broadcast_copies_the_source_rank(run):
    for result in run(3, broadcast, 2):
        np.testing.assert_array_equal(result, array_of(2))


def gathered(group):
    return group.all_gather(array_of(group.rank).T)  # not contiguous on purpose


def test_all_gather_returns_everyones_array_by_rank(run):
    for result in run(3, gathered):
        for rank, part in enumerate(result):
            np.testing.assert_array_equal(part, array_of(rank).T)


def scattered(group, op):
    return group.reduce_scatter(array_of(group.rank, shape=(6, 2)), op)


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_reduce_scatter_gives_each_rank_its_rows_of_the_reduction(run, op):
    expected = getattr(np, op)(np.stack([array_of(rank, shape=(6, 2)) for rank in range(3)]), axis=0)
    np.testing.assert_allclose(np.concatenate(run(3, scattered, op)), expected, rtol=1e-12)


def scatter_unevenly(group):
    with pytest.raises(ValueError, match=r"over 3 ranks cannot cut the shape \(4, 3\)"):
        group.reduce_scatter(array_of(group.rank))


def test_reduce_scatter_refuses_what_it_cannot_cut(run):
    run(3, scatter_unevenly)


def exchanged(group):
    return group.exchange({"rank": group.rank, "text": "é" * group.rank, "none": None, "list": [1.5, True]})


def test_exchange_carries_json_of_unequal_length(run):
    expected = [{"rank": r, "text": "é" * r, "none": None, "list": [1.5, True]} for r in range(3)]
    assert run(3, exchanged) == [expected] * 3


def exchange_unspeakable(group):
    with pytest.raises(TypeError, match="JSON"):
        group.exchange(object())


def test_exchange_refuses_what_is_not_json(run):
    run(1, exchange_unspeakable)


def passed_around(group):
    """Each rank sends two arrays to its right; they arrive in order."""
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    received = [np.empty((4, 3)), np.empty((4, 3))]
    works = [group.recv_(array, left) for array in received]
    works += [group.send(array_of(group.rank * 10 + number), right) for number in range(2)]
    for work in works:
        assert isinstance(work, Work)
        work.wait()
    return received


def test_links_deliver_in_the_order_of_sending(run):
    for rank, received in enumerate(run(3, passed_around)):
        left = (rank - 1) % 3
        for number in range(2):
            np.testing.assert_array_equal(received[number], array_of(left * 10 + number))


def transposed(group):
    return group.all_to_all([np.full((to, group.rank + 1), 10 * group.rank + to) for to in range(group.size)])


def test_all_to_all_carries_unequal_shapes(run):
    for rank, received in enumerate(run(3, transposed)):
        for source, array in enumerate(received):
            np.testing.assert_array_equal(array, np.full((rank, source + 1), 10 * source + rank))


def meets_its_protocols(group):
    group.barrier()
    return isinstance(group, Group) and isinstance(group, Links), group.rank, group.size


def test_it_is_a_group_with_links_of_known_rank_and_size(run):
    assert run(2, meets_its_protocols) == [(True, 0, 2), (True, 1, 2)]


def split(group):
    half = group.split(group.rank % 2, name="half")
    total = np.array([float(group.rank)])
    half.all_reduce_(total).wait()
    return half.rank, half.size, total[0], half.exchange(group.rank)


def test_a_split_group_holds_those_of_one_colour_in_their_order(run):
    assert run(3, split) == [(0, 2, 2.0, [0, 2]), (0, 1, 1.0, [1]), (1, 2, 2.0, [0, 2])]


def half_precision(group, name):
    import ml_dtypes  # noqa: F401  makes NumPy know the name

    dtype = np.dtype(name)
    values = [[40000.0, 1.0, 0.1], [40000.0, 1.0, 0.1], [-40000.0, 1.0, 0.1]][group.rank]
    array = np.array(values, np.float32).astype(dtype)
    group.all_reduce_(array, "mean").wait()
    rows = np.array([values] * 3, np.float32).astype(dtype)
    scattered = group.reduce_scatter(rows)
    return str(array.dtype), array.astype(float).tolist(), scattered.astype(float).tolist()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("run", ["threads", "mpi"], indirect=True)  # torch's add up as its backends do
def test_sums_of_16_bit_floats_are_taken_in_float32_and_rounded_once(run, name):
    pytest.importorskip("ml_dtypes", reason="NumPy's bfloat16 is that of ml_dtypes")
    (dtype, mean, sums), *others = run(3, half_precision, name)
    assert dtype == name and all(other == (dtype, mean, sums) for other in others)
    np.testing.assert_allclose(mean, [40000 / 3, 1, 0.1], rtol=1e-2)
    np.testing.assert_allclose(sums, [[40000, 3, 0.3]], rtol=1e-2)
