"""Split layers compute what the whole layer computes, forward and backward; the whole layer is the oracle."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.comm.threads import run_ranks
from trainfleet.errors import PlanError
from trainfleet.mpi.layers import GELU, Embedding, Linear
from trainfleet.mpi.linear import LinearPair, VocabularyEmbedding, part_of, split_linear


def whole(num_in=8, num_out=12, seed=0, bias=True):
    linear = Linear.random(num_in, num_out, np.random.default_rng(seed), np.float64)
    return linear if bias else Linear({"weight": linear.parameters["weight"]})


X = np.random.default_rng(5).normal(size=(3, 2, 8))
DY = np.random.default_rng(6).normal(size=(3, 2, 12))


def both_ways(layer, x, dy):
    y, saved = layer.forward(x)
    dx, gradients = layer.backward(saved, dy)
    return y, dx, gradients


def split(group, by, bias, gather):
    layer = split_linear(whole(bias=bias), group, by, gather_output=gather)
    x = part_of(X, group, 2) if by == "row" else X
    dy = DY if by == "row" or gather else part_of(DY, group, 2)
    return both_ways(layer, x, dy)


def joined(parts, dim):
    return np.concatenate(parts, axis=dim)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("by", "gather"), [("column", False), ("column", True), ("row", False)])
def test_the_parts_join_to_the_whole(run, by, gather, bias):
    y, dx, gradients = both_ways(whole(bias=bias), X, DY)
    ys, dxs, parts = zip(*run(2, split, by, bias, gather))
    same = {"rtol": 1e-12, "atol": 1e-13}
    if by == "column":
        for each in ys if gather else [joined(ys, 2)]:
            np.testing.assert_allclose(each, y, **same)
        for each in dxs:
            np.testing.assert_allclose(each, dx, **same)
        for key, gradient in gradients.items():
            np.testing.assert_allclose(joined([part[key] for part in parts], 0), gradient, **same)
    else:
        for each in ys:
            np.testing.assert_allclose(each, y, **same)
        np.testing.assert_allclose(joined(dxs, 2), dx, **same)
        np.testing.assert_allclose(joined([part["weight"] for part in parts], 1), gradients["weight"], **same)
        for part in parts:
            assert ("bias" in part) == bias
            if bias:
                np.testing.assert_allclose(part["bias"], gradients["bias"], **same)


class Counting:
    """A group that counts its sums."""

    def __init__(self, group):
        self._group, self.sums = group, 0

    def __getattr__(self, name):
        self.sums += name == "all_reduce_"
        return getattr(self._group, name)


def pair(group):
    counting = Counting(group)
    layer = LinearPair.split(whole(), GELU(), whole(12, 8, 1), counting)
    y, saved = layer.forward(X)
    forward = counting.sums
    dx, _ = layer.backward(saved, X)
    return y, dx, forward, counting.sums - forward


def test_a_pair_is_joined_by_one_sum_each_way(run):
    model = LinearPair([whole(), GELU(), whole(12, 8, 1)])
    y, dx, _ = both_ways(model, X, X)
    for result in run(2, pair):
        np.testing.assert_allclose(result[0], y, rtol=1e-12)
        np.testing.assert_allclose(result[1], dx, rtol=1e-12)
        assert result[2:] == (1, 1)


def embedded(group):
    table = np.random.default_rng(0).normal(size=(6, 3))
    tokens = np.array([[0, 5, 2], [3, 3, 1]])
    whole_layer, part = Embedding({"weight": table}), VocabularyEmbedding(table, group)
    (y, _), (ours, saved) = whole_layer.forward(tokens), part.forward(tokens)
    dy = np.random.default_rng(1).normal(size=y.shape)
    _, gradients = whole_layer.backward(tokens, dy)
    _, own = part.backward(saved, dy)
    np.testing.assert_allclose(ours, y)
    np.testing.assert_allclose(own["weight"], part_of(gradients["weight"], group, 0))
    return True


def test_a_split_vocabulary_embeds_as_the_whole(run):
    assert run(2, embedded) == [True, True]


def test_a_width_that_ranks_do_not_divide_is_refused_with_those_that_do():
    with pytest.raises(PlanError, match=r"3 ranks do not divide 8 inputs\. Use tp = one of \[1, 2, 4, 8\]"):
        run_ranks(3, lambda group: split_linear(whole(), group, "row"))
