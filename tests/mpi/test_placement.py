"""Layers on ranks, one stretch each, by their cost."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.comm.threads import run_ranks
from trainfleet.errors import PlanError
from trainfleet.mpi.cross_entropy import cross_entropy
from trainfleet.mpi.layers import mlp
from trainfleet.mpi.pipeline import run_pipeline
from trainfleet.mpi.placement import num_parameters, place_layers

X, TARGETS = np.random.default_rng(0).normal(size=(6, 4)), np.arange(6) % 3


def model():
    return mlp([4, 8, 8, 3], dtype=np.float64)


def placed(group, costs):
    return list(place_layers(model(), group, costs).layers)


def test_every_layer_is_on_one_rank_and_the_costliest_stretch_is_cheap(run):
    assert run(2, placed, None) == [["0", "1"], ["2", "3", "4"]]
    assert run(2, placed, [1, 1, 1, 1, 9]) == [["0", "1", "2", "3"], ["4"]]
    assert num_parameters(model()) == 4 * 8 + 8 + 8 * 8 + 8 + 8 * 3 + 3


def naive(group):
    """One batch, one rank at a time: a pipeline of one micro-batch."""
    passed = run_pipeline(place_layers(model(), group), [(X, TARGETS)], cross_entropy, group)
    return passed.loss.total, passed.gradients


def test_placed_layers_compute_what_one_process_computes(run):
    whole = model()
    y, saved = whole.forward(X)
    loss, dy = cross_entropy(y, TARGETS)
    _, gradients = whole.backward(saved, dy)
    results = run(2, naive)
    assert [total for total, _ in results] == pytest.approx([loss.total] * 2)
    joined = results[0][1] | results[1][1]
    assert joined.keys() == gradients.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(joined[name], gradient, rtol=1e-12)


def test_more_ranks_than_layers_are_refused():
    with pytest.raises(PlanError, match="1 layers cannot be placed on 2 ranks"):
        run_ranks(2, lambda group: place_layers(mlp([2, 2]), group))
