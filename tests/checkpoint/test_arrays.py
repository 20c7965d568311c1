from __future__ import annotations

import numpy as np
import pytest

from trainfleet.checkpoint.arrays import DTYPES, as_words, copy_bytes, dtype_of, fill, library_of, make, num_bytes
from trainfleet.errors import CheckpointError

NUMPY = [name for name in DTYPES if name != "bfloat16" and not name.startswith("float8")]


def stored(array, dtype):
    data = np.empty(num_bytes(dtype, tuple(array.shape)), np.uint8)
    copy_bytes(array, dtype, data)
    return data


def some_bytes(dtype, shape):
    data = np.random.default_rng(0).integers(0, 256, num_bytes(dtype, shape), np.uint8)
    return data & 1 if dtype == "bool" else data


@pytest.mark.parametrize("shape", [(), (3, 4), (0, 2)])
@pytest.mark.parametrize("dtype", NUMPY)
def test_numpy_arrays_come_back_to_the_bit(dtype, shape):
    data = some_bytes(dtype, shape)
    array = make("numpy", dtype, shape, data)
    assert dtype_of(array, "x") == dtype
    assert library_of(array) == "numpy"
    assert (stored(array, dtype) == data).all()
    blank = np.zeros(shape, dtype)
    assert fill(blank, data) is blank
    assert blank.tobytes() == data.tobytes() == array.tobytes()


@pytest.mark.parametrize("shape", [(), (3, 4), (0, 2)])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_tensors_come_back_to_the_bit(dtype, shape):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    data = some_bytes(dtype, shape)
    tensor = make("torch", dtype, shape, data)
    assert tensor.dtype == getattr(torch, dtype)
    assert library_of(tensor) == "torch"
    assert (stored(tensor, dtype) == data).all()
    blank = torch.zeros(shape, dtype=getattr(torch, dtype))
    assert fill(blank, data) is blank
    assert (stored(blank, dtype) == data).all()


def test_strided_and_foreign_endian_arrays_are_stored_in_order_and_little_endian():
    base = np.arange(12, dtype=np.int32).reshape(3, 4)
    for array in (base.T, base[::2, ::-1], base.astype(">i4"), np.asfortranarray(base)):
        assert dtype_of(array, "x") == "int32"
        assert stored(array, "int32").tobytes() == np.ascontiguousarray(array).astype("<i4").tobytes()
        assert (fill(np.zeros_like(array), stored(array, "int32")) == array).all()
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.arange(12).reshape(3, 4).t()
    assert stored(tensor, "int64").tobytes() == tensor.contiguous().numpy().tobytes()


def test_a_parameter_is_filled_in_place_without_a_gradient():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    parameter = torch.nn.Parameter(torch.zeros(2))
    fill(parameter, np.array([1, 2], np.float32).view(np.uint8))
    assert parameter.tolist() == [1, 2]
    assert parameter.grad_fn is None


def test_a_read_only_array_is_replaced():
    frozen = np.zeros(2, np.float32)
    frozen.flags.writeable = False
    filled = fill(frozen, np.array([1, 2], np.float32).view(np.uint8))
    assert filled.tolist() == [1, 2]
    assert frozen.tolist() == [0, 0]


def test_words_cut_any_dtype():
    data = np.arange(64, dtype=np.uint8)
    words = as_words(data, "complex128", (2, 2))
    assert words[1].tobytes() == data[32:].tobytes()


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([object()]), np.zeros(1, "M8[s]")])
def test_dtypes_without_a_fixed_meaning_are_refused(array):
    with pytest.raises(CheckpointError, match=r"s/x cannot be stored: its dtype"):
        dtype_of(array, "s/x")


def test_masked_meta_and_sparse_are_refused_with_a_remedy():
    with pytest.raises(CheckpointError, match="mask"):
        dtype_of(np.ma.masked_array([1.0], [True]), "x")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(CheckpointError, match="meta"):
        dtype_of(torch.zeros(1, device="meta"), "x")
    with pytest.raises(CheckpointError, match="sparse"):
        dtype_of(torch.zeros(1).to_sparse(), "x")
