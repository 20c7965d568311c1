"""Floats are rounded to the nearest of the other dtype, as torch does it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainfleet.checkpoint.floats import FLOATS, recast

VALUES = [0.0, -0.0, 1.0, 1 / 3, -2.7e-5, 65504.0, 65520.0, 1e-8, 3.3e38, 1e300, np.inf, -np.inf, np.nan, 1.00390625]


@pytest.mark.parametrize(("have", "want"), [*itertools.permutations(FLOATS, 2)])
def test_every_cast_is_that_of_torch(have, want):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.tensor(VALUES, dtype=torch.float64).to(getattr(torch, have))
    # Through float32, as both round once more from float64 to the small types.
    through = tensor.float() if have == "float64" and want != "float32" else tensor
    data = tensor.view(torch.uint8).numpy()
    found = torch.from_numpy(recast(data, have, want).copy()).view(getattr(torch, want))
    assert torch.equal(found.nan_to_num(1.5, 2.5, 3.5), through.to(getattr(torch, want)).nan_to_num(1.5, 2.5, 3.5))
    assert torch.equal(found.isnan(), tensor.isnan())


def test_the_same_dtype_costs_no_copy():
    data = np.zeros(8, np.uint8)
    assert recast(data, "float32", "float32") is data
