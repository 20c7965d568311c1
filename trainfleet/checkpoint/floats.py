"""Floats of one dtype as those of another, each rounded to the nearest."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainfleet.checkpoint.arrays import Bytes
from trainfleet.codec import BFloat16, Float16

FLOATS = ("float64", "float32", "bfloat16", "float16")
"""The dtypes between which `recast` works."""


def recast(data: Bytes, have: str, want: str) -> Bytes:
    """The bytes of floats of dtype `have` as those of `want`, each rounded to the nearest."""
    if have == want:
        return data
    values = BFloat16().decode((data.view("<u2"),)) if have == "bfloat16" else data.view(_numpy(have))
    with np.errstate(over="ignore"):
        if want == "bfloat16":
            rounded = BFloat16().encode(values)[0].astype("<u2")
        elif want == "float16":
            rounded = Float16().encode(values)[0].astype("<f2")
        else:
            rounded = values.astype(_numpy(want))
    found: Bytes = rounded.view(np.uint8)
    return found


def _numpy(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")
