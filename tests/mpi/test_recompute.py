"""Segments give the same gradients, in the memory that the formula says."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from trainfleet.errors import PlanError
from trainfleet.mpi.layers import Function, Sequential, Tanh, mlp
from trainfleet.mpi.recompute import Recompute


@pytest.mark.parametrize("segments", [1, 2, 5, ("1", "4"), ("0", "2")])
def test_gradients_are_the_same_to_the_bit(segments):
    x = np.random.default_rng(0).normal(size=(3, 4))
    plain, model = mlp([4, 5, 5, 2], dtype=np.float64), mlp([4, 5, 5, 2], dtype=np.float64)
    found = []
    for each in (plain, Recompute(model, segments)):
        y, saved = each.forward(x)
        found.append((y, *each.backward(saved, y)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert found[0][2].keys() == found[1][2].keys()
    for name in found[0][2]:
        np.testing.assert_array_equal(found[0][2][name], found[1][2][name])


def peak(model, x):
    """Bytes at most, between the begin of forward and the end of backward, in units of one activation."""
    tracemalloc.start()
    y, saved = model.forward(x)
    model.backward(saved, y)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most / x.nbytes


def test_the_peak_of_memory_falls_as_the_formula_says():
    """n + c without segments, k + n/k + c with k of them; c is what one layer takes while it computes."""
    x, count = np.ones((400, 500)), 36
    layers = Sequential([Tanh() for _ in range(count)])
    whole = peak(layers, x)
    constant = whole - count
    assert 0 <= constant < 5
    for segments in (2, 6, 18):
        found = peak(Recompute(layers, segments), x)
        assert found == pytest.approx(segments + count / segments + constant, abs=2.5), segments
        assert found < whole * 0.75


def test_functions_of_your_own_are_recomputed():
    """Named functions with a derivative written by hand, in two segments."""
    square = Function(lambda x: (x * x, x), lambda saved, dy: 2 * saved * dy)
    double = Function(lambda x: (2 * x, None), lambda saved, dy: 2 * dy)
    model = Recompute(Sequential({"square": square, "double": double, "again": square}), ["double"])
    x = np.array([1.0, -3.0])
    y, saved = model.forward(x)
    dx, gradients = model.backward(saved, np.ones(2))
    assert y.tolist() == [4.0, 324.0] and dx.tolist() == [16.0, -432.0] and gradients == {}


def test_unknown_names_and_impossible_numbers_are_refused():
    model = mlp([4, 5, 2])
    with pytest.raises(PlanError, match="There is no layer '7', 'x'; there are 0, 1, 2"):
        Recompute(model, ["1", "7", "x"])
    with pytest.raises(PlanError, match="3 layers cannot be cut into 4 segments; use 1 to 3"):
        Recompute(model, 4)
