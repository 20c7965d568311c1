"""What can be reduced, in which width, and how arrays of both libraries become NumPy's without a copy."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.comm.numbers import add_up_, as_numpy, check_reduction, is_small_float, like, reduce_parts, signature

ml_dtypes = pytest.importorskip("ml_dtypes", reason="NumPy's bfloat16 is that of ml_dtypes")


def test_small_floats_are_the_two_of_16_bits():
    dtypes = [np.float16, ml_dtypes.bfloat16, np.float32, np.int16]
    assert [is_small_float(np.dtype(dtype)) for dtype in dtypes] == [True, True, False, False]


def test_small_floats_are_added_up_in_float32():
    parts = [np.array([60000, 1], np.float16), np.array([60000, 2], np.float16), np.array([-60000, 3], np.float16)]
    assert reduce_parts(parts, "sum").tolist() == [60000, 6]
    assert reduce_parts(parts, "mean").dtype == np.float16


@pytest.mark.parametrize("op", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_rows_are_added_up_as_parts_are(op, dtype):
    rows = np.random.default_rng(0).normal(size=(3, 5)).astype(dtype)
    np.testing.assert_array_equal(add_up_(rows.copy(), op), reduce_parts(list(rows), op))


def test_means_are_of_floats_only_and_reductions_have_names():
    check_reduction(np.ones(1, ml_dtypes.bfloat16), "mean")
    with pytest.raises(TypeError, match="mean of int64"):
        check_reduction(np.ones(1, np.int64), "mean")
    with pytest.raises(ValueError, match="use one of sum, mean, max, min"):
        check_reduction(np.ones(1), "median")


def test_a_signature_is_dtype_and_shape():
    assert signature(np.ones((2, 3), np.float32)) == "float32 (2, 3)"


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int64"])
def test_tensors_share_their_memory_and_come_back_as_tensors(name):
    torch = pytest.importorskip("torch", reason="tensors are torch's")
    tensor = torch.arange(4).to(getattr(torch, name))
    seen = as_numpy(tensor)
    assert str(seen.dtype) == name
    seen[0] = 7
    assert tensor[0] == 7
    back = like(tensor, seen)
    assert back.dtype == tensor.dtype and torch.equal(back, tensor)
    assert like(seen, seen) is seen


def test_what_is_no_array_in_cpu_memory_is_refused():
    with pytest.raises(TypeError, match="this is a list"):
        as_numpy([1.0])
    torch = pytest.importorskip("torch", reason="tensors are torch's")
    with pytest.raises(TypeError, match=r"on meta.*tensor\.cpu\(\)"):
        as_numpy(torch.ones(1, device="meta"))
