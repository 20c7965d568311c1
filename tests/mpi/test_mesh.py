"""Ranks on axes: each group holds those that differ on its axis alone."""

from __future__ import annotations

import pytest

from trainfleet.comm.threads import run_ranks
from trainfleet.errors import PlanError
from trainfleet.mpi.mesh import Mesh
from trainfleet.plan import Plan


def axes(group, plan):
    mesh = Mesh(group, plan)
    members = {name: mesh[name].exchange(group.rank) for name in mesh.plan_axes}
    return mesh.plan_axes, members, mesh.data_axes.exchange(group.rank), mesh.is_main


def test_four_ranks_by_tensor_and_data(run):
    results = run(4, axes, Plan(dp_replicate=2, tp=2, pp=1))
    assert results[0][0] == {"dp_replicate": 2, "dp_shard": 1, "pp": 1, "tp": 2}
    assert [result[1]["tp"] for result in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [result[1]["dp_replicate"] for result in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [result[2] for result in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [result[3] for result in results] == [True, False, False, False]


def test_eight_ranks_on_three_axes():
    results = run_ranks(8, lambda group: axes(group, Plan(zero=2, dp_shard=2, pp=2, tp=2)))
    assert results[5][1] == {"dp_replicate": [5], "dp_shard": [1, 5], "pp": [5, 7], "tp": [4, 5]}


def test_two_ranks_are_data_parallel_by_themselves(run):
    assert [result[2] for result in run(2, axes, Plan())] == [[0, 1]] * 2


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(tp=3), r"plan\.tp=3 does not divide the 2 processes"),
        (Plan(tp=2, dp_replicate=2), "Start 4, or change the plan"),
        (Plan(precision="bf16"), r"plan\.precision is 'bf16', but NumPy models know 'fp32' only"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_words(plan, words):
    with pytest.raises(PlanError, match=words):
        run_ranks(2, lambda group: Mesh(group, plan))


def test_an_unknown_axis_is_named():
    def ask(group):
        with pytest.raises(KeyError, match="no axis 'cp'; it has dp_replicate, dp_shard, pp, tp"):
            Mesh(group)["cp"]

    run_ranks(1, ask)
