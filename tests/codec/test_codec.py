from __future__ import annotations

import numpy as np

from trainfleet.codec import BFloat16, Codec, Float16


class Halves:
    """The smallest codec of two parts."""

    def encode(self, array):
        return array[: len(array) // 2], array[len(array) // 2 :]

    def decode(self, parts):
        return np.concatenate(parts)


def test_whatever_encodes_and_decodes_is_a_codec():
    assert all(isinstance(codec, Codec) for codec in (Float16(), BFloat16(), Halves()))
    assert not isinstance(np.float16, Codec)


def test_codecs_compose_part_by_part():
    array = np.arange(5, dtype=np.float32)
    parts = [Float16().encode(part) for part in Halves().encode(array)]
    assert (Halves().decode(tuple(Float16().decode(part) for part in parts)) == array).all()
