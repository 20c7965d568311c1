"""What threads can do better than processes: name the rank, the call, the shape and the dtype that do not fit."""

from __future__ import annotations

import time
from datetime import timedelta

import numpy as np
import pytest

from trainfleet.comm.threads import run_ranks
from trainfleet.errors import PeerError

SOON = timedelta(seconds=0.2)


def test_a_rank_that_does_not_come_is_named_at_the_deadline():
    def lag(group):
        if group.rank != 1:
            group.all_reduce_(np.ones(3)).wait()

    began = time.monotonic()
    with pytest.raises(PeerError, match=r"called all_reduce_ sum of float64 \(3,\), but ranks \[1\] did not"):
        run_ranks(3, lag, timeout=SOON)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("array", "words"),
    [(np.ones(4), r"float64 \(4,\)"), (np.ones(3, "float32"), r"float32 \(3,\)")],
    ids=["shape", "dtype"],
)
def test_unlike_arrays_are_named_on_every_rank(array, words):
    heard = []

    def disagree(group):
        try:
            group.all_reduce_(array if group.rank == 1 else np.ones(3)).wait()
        except PeerError as exc:
            heard.append(str(exc))
            raise

    with pytest.raises(PeerError, match=words):
        run_ranks(2, disagree)
    assert len(heard) == 2
    assert all("Rank" in text and "called" in text for text in heard)


def test_unlike_calls_are_named():
    def disagree(group):
        group.barrier() if group.rank else group.all_gather(np.ones(1))

    with pytest.raises(PeerError, match="barrier"):
        run_ranks(2, disagree)


def test_the_error_of_the_rank_that_failed_first_is_raised_and_frees_the_others():
    def fail(group):
        if group.rank == 2:
            raise KeyError("mine")
        group.barrier()

    began = time.monotonic()
    with pytest.raises(KeyError, match="mine"):
        run_ranks(4, fail)
    assert time.monotonic() - began < 2


def test_a_letter_of_another_shape_is_refused():
    def post(group):
        if group.rank == 0:
            group.send(np.ones(3), 1).wait()
        else:
            group.recv_(np.ones(4), 0).wait()

    with pytest.raises(PeerError, match=r"recv_ of float64 \(4,\), but rank 0 sent float64 \(3,\)"):
        run_ranks(2, post)


def test_a_letter_that_does_not_come_is_named_at_the_deadline():
    with pytest.raises(PeerError, match="rank 1 did not send"):
        run_ranks(2, lambda group: group.rank or group.recv_(np.ones(1), 1).wait(), timeout=SOON)


def test_a_rank_that_never_returns_is_named():
    def sleep(group):
        time.sleep(1.0 if group.rank == 1 else 0)

    with pytest.raises(TimeoutError, match=r"Ranks \[1\] of 2"):
        run_ranks(2, sleep, deadline=SOON)


def test_half_precision_sums_in_float32():
    def add(group):
        array = np.array([40000.0, 1.0] if group.rank < 2 else [-40000.0, 1.0], np.float16)
        group.all_reduce_(array).wait()
        return array.tolist()

    assert run_ranks(4, add) == [[0.0, 4.0]] * 4


def test_what_all_have_read_is_forgotten():
    def many(group):
        for _ in range(20):
            group.all_reduce_(np.ones(2)).wait()
        group.barrier()
        group.exchange(None)
        return len(group._room.calls)

    assert max(run_ranks(3, many)) <= 1  # the last exchange may still be read by the slowest
