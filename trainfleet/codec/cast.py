"""Casts: half the bytes of a float32, by rounding each number to the nearest float16 or bfloat16.

Both round to nearest, ties to even, and mean the same numbers for NumPy and torch; a float64 becomes
float32 first. NaN stays NaN and infinities stay. A finite number beyond the largest of the small type
becomes infinite, as IEEE 754 says, so that whoever watches for overflow sees it; or the largest, with
its sign, with `saturate`.

              sign exponent fraction   largest    relative rounding error
    float16      1        5       10     65504    2^-11, from 6.1e-5 on; nothing left below 3.0e-8
    bfloat16     1        8        7   3.39e38    2^-8, over the range of float32
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trainfleet.codec.codec import Array
from trainfleet.state import is_tensor

_LARGEST_FLOAT16 = 65504.0
_LARGEST_BFLOAT16 = (2 - 2**-7) * 2.0**127


@dataclass(frozen=True, kw_only=True, slots=True)
class Float16:
    """Floats as float16: finer than bfloat16 where values lie between 1e-4 and 65504. Decodes to float32."""

    saturate: bool = False
    """Make finite numbers that are too large the largest, not infinite."""

    def encode(self, array: Array) -> tuple[Array, ...]:
        if is_tensor(array):
            return (_bounded_tensor(array, _LARGEST_FLOAT16, self.saturate).half(),)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return (_bounded(array, _LARGEST_FLOAT16, self.saturate).astype(np.float16),)

    def decode(self, parts: tuple[Array, ...]) -> Array:
        (half,) = parts
        return half.float() if is_tensor(half) else half.astype(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class BFloat16:
    """Floats as bfloat16: the range of float32 with 8 significant bits. Decodes to float32.

    NumPy has no bfloat16: there the words are uint16 arrays, the upper halves of the rounded float32.
    """

    saturate: bool = False
    """Make finite numbers that are too large the largest, not infinite."""

    def encode(self, array: Array) -> tuple[Array, ...]:
        if is_tensor(array):
            return (_bounded_tensor(array, _LARGEST_BFLOAT16, self.saturate).bfloat16(),)
        values = _bounded(array, _LARGEST_BFLOAT16, self.saturate)
        bits = values.view(np.uint32)
        # Adding just under half of the last kept bit, or half where that bit is odd, rounds ties to even.
        # A carry out of the fraction raises the exponent, up to that of infinity: what rounding asks for.
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
        return (np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16),)

    def decode(self, parts: tuple[Array, ...]) -> Array:
        (words,) = parts
        if is_tensor(words):
            return words.float()
        if words.dtype != np.uint16:
            raise TypeError(f"bfloat16 in NumPy is kept in uint16 words; these are {words.dtype}.")
        return (words.astype(np.uint32) << 16).view(np.float32)


def _bounded(array: Array, largest: float, saturate: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The array in float32, with its finite numbers brought within `largest` if asked."""
    given = np.asarray(array)
    if given.dtype.kind != "f":
        raise TypeError(f"Only floats can be cast; this array is {given.dtype}.")
    with np.errstate(over="ignore"):
        values = given.astype(np.float32)
    if not saturate:
        return values
    return np.where(np.isfinite(given), np.clip(values, np.float32(-largest), np.float32(largest)), values)


def _bounded_tensor(tensor: Any, largest: float, saturate: bool) -> Any:
    if not tensor.is_floating_point():
        raise TypeError(f"Only floats can be cast; this tensor is {tensor.dtype}.")
    values = tensor.detach().float()
    return values.clamp(-largest, largest).where(tensor.detach().isfinite(), values) if saturate else values
