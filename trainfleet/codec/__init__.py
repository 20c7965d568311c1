"""Arrays to smaller arrays and back, on whatever device they live."""

from __future__ import annotations

from trainfleet.codec.cast import BFloat16, Float16
from trainfleet.codec.codec import Array, Codec

__all__ = ["Array", "BFloat16", "Codec", "Float16"]
