"""Megatron's blocks: heads and hidden widths split over ranks give what one rank gives."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.comm.threads import run_ranks
from trainfleet.errors import PlanError
from trainfleet.mpi.attention import SelfAttention, transformer_block
from trainfleet.mpi.linear import part_of
from trainfleet.mpi.parallelize import split_layers

X = np.random.default_rng(0).normal(size=(2, 5, 8))


def block():
    return transformer_block(8, 4, np.random.default_rng(1), dtype=np.float64)


def split(group):
    model = split_layers(block(), group)
    y, saved = model.forward(X)
    dx, gradients = model.backward(saved, X)
    own = {name: value.shape for name, value in model.parameters.items()}
    cuts = {name: dim for name, (dim, _) in model.cuts.items()}
    whole = block()
    _, gradients_of_whole = whole.backward(whole.forward(X)[1], X)
    for name, gradient in gradients.items():
        expected = gradients_of_whole[name]
        expected = part_of(expected, group, cuts[name]) if name in cuts else expected
        np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12, err_msg=name)
    return y, dx, own


@pytest.mark.parametrize("size", [2, 4])
def test_a_split_block_computes_what_the_whole_computes(run, size):
    model = block()
    y, saved = model.forward(X)
    dx, _ = model.backward(saved, X)
    for own_y, own_dx, shapes in run(size, split):
        np.testing.assert_allclose(own_y, y, rtol=1e-10)
        np.testing.assert_allclose(own_dx, dx, rtol=1e-10, atol=1e-12)
        assert shapes["attention.heads.query.weight"] == (8 // size, 8)
        assert shapes["mlp.pair.2.weight"] == (8, 32 // size)
        assert shapes["mlp.pair.2.bias"] == shapes["attention.norm.weight"] == (8,)


def test_causal_attention_does_not_look_ahead():
    layer = SelfAttention.random(8, 2, np.random.default_rng(0), causal=True, dtype=np.float64)
    changed = X.copy()
    changed[:, 3:] += 1
    np.testing.assert_array_equal(layer.forward(X)[0][:, :3], layer.forward(changed)[0][:, :3])


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(PlanError, match="3 heads do not divide the width 8"):
        SelfAttention.random(8, 3, np.random.default_rng(0))
    with pytest.raises(PlanError, match="3 ranks do not divide 4 heads"):
        run_ranks(3, lambda group: split_layers(block(), group))
