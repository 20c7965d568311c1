"""Computation and communication of each phase, over ranks."""

from __future__ import annotations

import time

import numpy as np
import pytest

from trainfleet.comm.group import Group, Links
from trainfleet.comm.threads import run_ranks
from trainfleet.mpi.timers import Timers


def measured(group):
    timers = Timers(group)
    for _ in range(2):
        with timers("backward"):
            time.sleep(0.05 * (group.rank + 1))  # the fast rank then waits for the slow one
            timers.group.all_reduce_(np.ones(3)).wait()
    if group.rank == 0:
        with timers("writing"):
            pass
    timers.group.barrier()  # outside of every phase
    return timers.gathered()


def test_waiting_for_others_is_communication_and_the_rest_computation(run):
    for phases in run(2, measured):
        backward = phases["backward"]
        assert backward.count == 2
        assert 0.08 <= backward.computation.minimum < 0.19 <= backward.computation.maximum
        assert backward.computation.median == pytest.approx(
            (backward.computation.minimum + backward.computation.maximum) / 2
        )
        assert backward.communication.maximum > 0.05 > backward.communication.minimum
        assert phases["writing"].computation.minimum == 0


def test_phases_do_not_nest_and_can_be_forgotten():
    def nested(group):
        timers = Timers(group)
        with timers("a"), pytest.raises(RuntimeError, match="'b' begins within another"), timers("b"):
            pass
        timers.reset()
        return timers.gathered()

    assert run_ranks(1, nested) == [{}]


def every_call(group):
    timed = Timers(group).group
    assert isinstance(timed, Group) and isinstance(timed, Links)
    other = 1 - timed.rank
    array, came = np.full(2, float(timed.rank)), np.empty(2)
    sent = timed.send(array, other)
    timed.recv_(came, other).wait()
    sent.wait()
    timed.broadcast_(array, 1).wait()
    half = timed.split(timed.rank)
    return (
        came.tolist(),
        array.tolist(),
        [part.tolist() for part in timed.all_gather(array)],
        timed.reduce_scatter(array).tolist(),
        timed.exchange(timed.rank),
        [part.tolist() for part in timed.all_to_all([array, array])],
        half.size,
    )


def test_a_timed_group_does_what_the_group_does(run):
    expected = ([1.0, 1.0], [[1.0, 1.0]] * 2, [2.0], [0, 1], [[1.0, 1.0]] * 2, 1)
    assert run(2, every_call) == [([float(1 - rank)] * 2, *expected) for rank in range(2)]
