"""What is special about MPI: unlike calls named by all, deadlines, tensors of torch, and no library at all."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import pytest

from trainfleet.errors import PeerError

SOON = timedelta(seconds=0.4)


def unlike_call(group, kind):
    """One rank of three calls something else; a group of its own breaks by it."""
    own = group.split(0, name="dp")
    odd = own.rank == 1
    with pytest.raises(PeerError) as caught:
        if kind == "shape":
            own.all_reduce_(np.ones(4 if odd else 3)).wait(SOON)
        elif kind == "large":
            own.all_reduce_(np.ones(100_000 if odd else 300_000)).wait(SOON)
        elif kind == "dtype":
            own.all_reduce_(np.ones(3, np.float32 if odd else np.float64)).wait(SOON)
        elif kind == "reduction":
            own.all_reduce_(np.ones(3), "max" if odd else "sum").wait(SOON)
        elif kind == "call":
            own.barrier(SOON) if odd else own.all_reduce_(np.ones(3)).wait(SOON)
        else:
            own.all_gather(np.ones(4 if odd else 3))
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("shape", "all_reduce_ sum float64 (4,)"),
        ("large", "all_reduce_ sum float64 (100000,)"),
        ("dtype", "all_reduce_ sum float32 (3,)"),
        ("reduction", "all_reduce_ max float64 (3,)"),
        ("call", "barrier"),
        ("gather", "all_gather float64 (4,)"),
    ],
)
def test_every_rank_hears_who_called_what(mpi_ranks, kind, word):
    for rank, sentence in enumerate(mpi_ranks(3, unlike_call, kind)):
        assert sentence.startswith(f"Rank {rank} along dp called ")
        assert word in sentence
        assert ("but rank 1 called" in sentence) == (rank != 1)


def large_sums(group, in_turns):
    """Of several parts and a rest that ranks do not divide, also of what does not lie in a row."""
    group._in_turns = in_turns
    found = []
    for op, dtype in (
        ("sum", "float32"),
        ("mean", "float64"),
        ("max", "int32"),
        ("min", "float32"),
        ("mean", "float16"),
    ):
        rows = [np.random.default_rng(rank).integers(-99, 99, 700_001).astype(dtype) for rank in range(group.size)]
        own, column = rows[group.rank].copy(), np.stack([rows[group.rank], rows[group.rank]], axis=1)[:, 0]
        work = group.all_reduce_(own, op)
        group.all_reduce_(column, op).wait()
        work.wait()
        expected = getattr(np.stack(rows).astype(np.float64), op)(axis=0).astype(dtype)
        assert np.array_equal(own, column)
        found.append(np.allclose(own, expected, rtol=1e-3 if dtype == "float16" else 1e-6))
    return found


@pytest.mark.parametrize("in_turns", [False, True])
def test_large_arrays_are_summed_part_by_part(mpi_ranks, in_turns):
    assert mpi_ranks(3, large_sums, in_turns) == [[True] * 5] * 3


def wait_for(group, call):
    own = group.split(0)
    if own.rank == 1:
        time.sleep(2.0)
        with pytest.raises(PeerError) as caught:
            own.barrier(SOON)
        return str(caught.value)
    began = time.monotonic()
    with pytest.raises(PeerError) as caught:
        if call == "barrier":
            own.barrier(SOON)
        elif call == "recv_":
            own.recv_(np.ones(3), 1).wait(SOON)
        else:
            own.all_reduce_(np.ones(3)).wait(SOON)
    assert time.monotonic() - began < 1.9
    return str(caught.value)


@pytest.mark.parametrize("call", ["all_reduce_ sum float64 (3,)", "barrier", "recv_"])
def test_a_rank_that_does_not_come_is_named_at_the_deadline(mpi_ranks, call):
    said = mpi_ranks(3, wait_for, call)
    assert all("rank 1 did not come" in said[rank] for rank in (0, 2))
    assert all(f"called {call}" in said[rank] for rank in (0, 2))  # each says it, or hears it from the other
    assert said[1].startswith("The group has broken up: Rank ")  # the late one hears why


def wait_elsewhere(group):
    pairs = group.split(0, name="tp")
    own = group.split(0, name="dp")
    with pytest.raises(PeerError) as caught:
        if group.rank == 0:
            own.recv_(np.ones(1), 1).wait(SOON)
        else:
            pairs.recv_(np.ones(2), 0).wait(timedelta(seconds=5))
    return str(caught.value)


def test_a_rank_that_waits_in_another_group_says_so(mpi_ranks):
    first, second = mpi_ranks(2, wait_elsewhere)
    assert "rank 1 waits in recv_ float64 (2,) from 0 along tp" in first
    assert second == f"The group has broken up: {first}"


def letters(group, count):
    own = group.split(0)
    if own.rank == 0:
        own.send(np.ones(count), 1)
        return ""
    with pytest.raises(PeerError) as caught:
        own.recv_(np.ones(4), 0).wait(SOON)
    return str(caught.value)


@pytest.mark.parametrize("count", [3, 5, 100_000])
def test_a_letter_of_another_shape_is_refused(mpi_ranks, count):
    sentence = f"Rank 1 called recv_ of float64 (4,), but rank 0 sent float64 ({count},)."
    assert mpi_ranks(2, letters, count)[1] == sentence


def tensors(group):
    import torch

    tensor = torch.full((2, 2), float(group.rank), dtype=torch.bfloat16, requires_grad=True)
    group.all_reduce_(tensor, "mean").wait()
    column = torch.full((3, 2), float(group.rank)).T  # not contiguous
    group.all_reduce_(column).wait()
    gathered = group.all_gather(torch.tensor([group.rank]))
    return str(tensor.dtype), tensor.tolist(), column.tolist(), [type(each).__name__ for each in gathered]


def test_tensors_in_cpu_memory_are_worked_on_in_place(mpi_ranks):
    pytest.importorskip("torch", reason="tensors are torch's")
    expected = ("torch.bfloat16", [[0.5, 0.5]] * 2, [[1.0] * 3] * 2, ["Tensor", "Tensor"])
    assert mpi_ranks(2, tensors) == [expected, expected]


def kinds(group):
    from trainfleet.comm.mpi_group import memory_kinds

    return "system" in memory_kinds(), "cuda" in memory_kinds()


def test_mpi_says_from_which_memory_it_sends(mpi_ranks):
    assert mpi_ranks(1, kinds)[0][0]


def test_long_signatures_keep_their_difference():
    from trainfleet.comm.mpi_group import _line, _text

    texts = [f"all_reduce_ sum float32 {tuple(range(40))[:-1]}{last}" for last in (1, 2)]
    first, second = map(_line, texts)
    assert len(first) == len(second) == 64 and _text(first) != _text(second)


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ("sys.modules['mpi4py'] = None", 'MPI needs the extra: pip install "trainfleet[mpi]"'),
        ("os.environ['MPI4PY_LIBMPI'] = '/nowhere/libmpi.so'", "found no MPI library"),
    ],
    ids=["no mpi4py", "no libmpi"],
)
def test_without_mpi_there_is_one_sentence(cause, words):
    pytest.importorskip("mpi4py", reason="MPI is not installed")
    program = f"""
import os, sys
{cause}
from trainfleet.comm.mpi_group import MpiGroup
from trainfleet.errors import DependencyError
try:
    MpiGroup.world()
except DependencyError as error:
    print(error, error.hint)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert words in done.stdout, done.stdout + done.stderr
