"""The bytes of arrays, whatever library they are of: the one place here that knows NumPy from torch."""

from __future__ import annotations

import ctypes
import importlib
import sys
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainfleet.errors import CheckpointError
from trainfleet.state import is_tensor

Bytes: TypeAlias = NDArray[np.uint8]


class Dtype(NamedTuple):
    itemsize: int
    safetensors: str
    """Its name in a safetensors header; `U8` where that format has none, and its bytes are kept as such."""


DTYPES = {
    "bool": Dtype(1, "BOOL"),
    "uint8": Dtype(1, "U8"),
    "int8": Dtype(1, "I8"),
    "uint16": Dtype(2, "U16"),
    "int16": Dtype(2, "I16"),
    "uint32": Dtype(4, "U32"),
    "int32": Dtype(4, "I32"),
    "uint64": Dtype(8, "U64"),
    "int64": Dtype(8, "I64"),
    "float8_e4m3fn": Dtype(1, "F8_E4M3"),
    "float8_e5m2": Dtype(1, "F8_E5M2"),
    "float16": Dtype(2, "F16"),
    "bfloat16": Dtype(2, "BF16"),
    "float32": Dtype(4, "F32"),
    "float64": Dtype(8, "F64"),
    "complex64": Dtype(8, "U8"),
    "complex128": Dtype(16, "U8"),
}
"""The dtypes that can be stored, little-endian."""


def is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or is_tensor(value)


def library_of(array: Any) -> str:
    return "torch" if is_tensor(array) else "numpy"


def shape_of(array: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in array.shape)


def dtype_of(array: Any, path: str) -> str:
    """The name of its dtype; CheckpointError, with `path`, for an array that cannot be stored."""
    name = str(array.dtype).removeprefix("torch.") if is_tensor(array) else array.dtype.name
    reason = None
    if name not in DTYPES:
        reason = f"its dtype is {array.dtype}; known are {', '.join(DTYPES)}"
    elif isinstance(array, np.ma.MaskedArray):
        reason = "it is a masked array; store its data and its mask"
    elif is_tensor(array) and hasattr(array, "device_mesh"):
        reason = "it is a DTensor, of which this rank holds a piece; give the piece as a ShardedArray"
    elif is_tensor(array) and (array.is_meta or str(array.layout) != "torch.strided"):
        reason = f"it is a tensor on {array.device} of layout {array.layout}; store a dense one that has numbers"
    if reason:
        raise CheckpointError(f"{path} cannot be stored: {reason}.")
    return name


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = DTYPES[dtype].itemsize
    for length in shape:
        count *= length
    return count


def as_words(data: Bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The bytes as an array of `shape` whose elements are uninterpreted words: enough to cut and join regions."""
    itemsize = DTYPES[dtype].itemsize
    word = np.dtype(f"<u{itemsize}") if itemsize <= 8 else np.dtype(f"V{itemsize}")
    return data.view(word).reshape(shape)


def copy_bytes(array: Any, dtype: str, target: Bytes, address: int | None = None) -> None:
    """Write the elements of `array`, in order and little-endian, into `target`, from whatever device.

    `address` is where `target` begins, for whoever knows it already.
    """
    if not target.size:
        return
    if is_tensor(array):
        torch: Any = sys.modules["torch"]
        if _lies_as_stored(array) and torch.get_num_threads() == 1:
            to = target.ctypes.data if address is None else address
            ctypes.memmove(to, array.data_ptr(), target.size)  # a tenth quicker than copy_
        else:
            torch.frombuffer(target, dtype=array.dtype).view(array.shape).copy_(array.detach())
    else:
        little = array.dtype.newbyteorder("<")
        target.view(little).reshape(array.shape)[...] = array


def _lies_as_stored(tensor: Any) -> bool:
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def fill(array: Any, data: Bytes) -> Any:
    """`array` with the elements of `data`: itself, filled in place, or a new one where it is read-only."""
    if is_tensor(array):
        torch: Any = importlib.import_module("torch")
        if data.size:
            with torch.no_grad():
                array.copy_(torch.frombuffer(data, dtype=array.dtype).view(array.shape))
        return array
    stored = data.view(array.dtype.newbyteorder("<")).reshape(array.shape)
    if not array.flags.writeable:
        return stored.astype(array.dtype)
    array[...] = stored
    return array


def make(library: str, dtype: str, shape: tuple[int, ...], data: Bytes) -> Any:
    """A new array of `data`, on the CPU."""
    if library == "torch":
        torch: Any = importlib.import_module("torch")
        return fill(torch.empty(shape, dtype=getattr(torch, dtype)), data)
    try:
        kind = np.dtype(dtype)
    except TypeError:
        # NumPy learns bfloat16 and float8 when ml_dtypes is imported; whoever stored this array had it.
        kind = np.dtype(getattr(importlib.import_module("ml_dtypes"), dtype))
    return data.view(kind.newbyteorder("<")).reshape(shape).astype(kind, copy=False)
