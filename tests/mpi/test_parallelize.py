"""A model spread by a plan keeps its names, and what cannot be split is said."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.comm.threads import run_ranks
from trainfleet.errors import PeerError, PlanError
from trainfleet.mpi.layers import Linear, Sequential, mlp
from trainfleet.mpi.mesh import Mesh
from trainfleet.mpi.optimizers import SGD
from trainfleet.mpi.parallelize import parallelize, split_layers
from trainfleet.mpi.recompute import Recompute
from trainfleet.plan import Plan


def draw():
    return np.random.default_rng(0)


def shapes(group, plan):
    spread = parallelize(mlp([8, 12, 6, 4]), SGD(learning_rate=1), Mesh(group, plan))
    return {name: value.shape for name, value in spread.model.parameters.items()}, type(spread.model)


def test_layers_are_split_placed_and_cut_into_bands_under_their_names(run):
    assert run(2, shapes, Plan(tp=2))[0][0] == {
        "0.weight": (6, 8), "0.bias": (6,), "2.weight": (6, 6), "2.bias": (6,), "4.weight": (4, 6), "4.bias": (4,)
    }  # fmt: skip
    assert [list(result[0]) for result in run(2, shapes, Plan(pp=2))] == [
        ["0.weight", "0.bias"],
        ["2.weight", "2.bias", "4.weight", "4.bias"],
    ]
    assert run(2, shapes, Plan(zero=3))[1][0]["4.weight"] == (2, 6)
    assert run(2, shapes, Plan(recompute="blocks"))[0][1] is Recompute


def test_a_model_without_a_pair_is_refused():
    model = Sequential([Linear.random(4, 4, np.random.default_rng(0))])
    with pytest.raises(PlanError, match="tp is 2, but no layer of this model can be split"):
        run_ranks(2, lambda group: split_layers(model, group))


def test_a_recomputed_part_stays_recomputed_when_it_is_split(run):
    assert run(2, split_recomputed) == [["0", "2"]] * 2


def split_recomputed(group):
    whole = Sequential([Recompute(mlp([8, 12, 6], dtype=np.float64), ["2"]), Linear.random(6, 2, draw(), np.float64)])
    model = split_layers(whole, group)
    x = np.ones((3, 8))
    np.testing.assert_allclose(model.forward(x)[0], whole.forward(x)[0], rtol=1e-12)
    assert model.parameters["0.0.weight"].shape == (6, 8)
    return [next(iter(segment.layers)) for segment in model.layers["0"].segments]


def unlike(group, make):
    with pytest.raises((PeerError, PlanError)) as caught:
        parallelize(make(group.rank), SGD(learning_rate=1), Mesh(group))
    return str(caught.value)


def test_models_that_are_not_alike_on_all_ranks_are_refused_by_name(run):
    for sentence in run(2, unlike, of_other_width):
        assert "'0.weight' float32 (5, 4) on rank 0 of 2, '0.weight' float32 (6, 4) on rank 1" in sentence
    for sentence in run(2, unlike, of_other_seed):
        assert "Parameter '0.weight' begins with other numbers on rank 1 than on rank 0." in sentence


def of_other_width(rank):
    return mlp([4, 5 + rank, 2])


def of_other_seed(rank):
    return mlp([4, 5, 2], seed=rank)
