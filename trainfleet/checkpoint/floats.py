"""Floats of one dtype as those of another, each rounded to the nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainfleet.checkpoint.arrays import Bytes
from trainfleet.codec import BFloat16, Float16

FLOATS = ("float64", "float32", "bfloat16", "float16")
"""The dtypes between which `recast` works."""


_CHUNK = 1 << 20  # elements rounded at once: rounding to bfloat16 takes four times the memory of what it rounds


def recast(data: Bytes, have: str, want: str) -> Bytes:
    """The bytes of floats of dtype `have` as those of `want`, each rounded to the nearest."""
    if have == want:
        return data
    values = data.view(_numpy(have))
    rounded = np.empty(values.size, _numpy(want))
    for start in range(0, values.size, _CHUNK):
        rounded[start : start + _CHUNK] = _recast(values[start : start + _CHUNK], have, want)
    found: Bytes = rounded.view(np.uint8)
    return found


def _recast(values: NDArray[Any], have: str, want: str) -> NDArray[Any]:
    if have == "bfloat16":
        values = BFloat16().decode((values,))
    if want == "bfloat16":
        found = BFloat16().encode(values)[0]
    elif want == "float16":
        found = Float16().encode(values)[0]
    else:
        with np.errstate(over="ignore"):
            found = values.astype(_numpy(want))
    return np.asarray(found)


def _numpy(dtype: str) -> np.dtype[Any]:
    """NumPy has no bfloat16: its words stand for it."""
    return np.dtype("<u2") if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<")
