"""Casts against the definition of rounding, and NumPy against torch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trainfleet.codec import BFloat16, Codec, Float16

CODECS = [Float16(), Float16(saturate=True), BFloat16(), BFloat16(saturate=True)]
# name -> (exponent of the smallest step, significant bits, largest)
FORMATS = {Float16: (-24, 11, 65504.0), BFloat16: (-133, 8, (2 - 2**-7) * 2.0**127)}
FLOATS = st.floats(width=32) | st.sampled_from([65504.0, 65519.0, 65520.0, 1e38, 3.4e38, 2.0**-25, 2.0**-134, -0.0])


def nearest(value: float, codec) -> float:
    """The oracle: round the significand in Python's integers, ties to even."""
    smallest, bits, largest = FORMATS[type(codec)]
    if not np.isfinite(value) or value == 0:
        return value
    _, exponent = np.frexp(value)
    step = max(int(exponent) - bits, smallest)
    rounded = float(round(value / 2.0**step)) * 2.0**step  # Python's round is to even, and both scalings are exact
    if abs(rounded) > largest:
        return float(np.copysign(largest if codec.saturate else np.inf, value))
    return float(np.copysign(rounded, value))


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_it_is_a_codec(codec):
    assert isinstance(codec, Codec)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@given(value=FLOATS)
def test_each_number_becomes_the_nearest_with_ties_to_even(codec, value):
    (decoded,) = codec.decode(codec.encode(np.array([value], np.float32)))
    expected = nearest(float(np.float32(value)), codec)
    assert np.array_equal(decoded, np.float32(expected), equal_nan=True)
    assert np.isnan(expected) or np.signbit(decoded) == np.signbit(expected)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@given(array=hnp.arrays(st.sampled_from(["f2", "f4", "f8"]), hnp.array_shapes(min_dims=0, min_side=0)))
def test_torch_and_numpy_agree_on_every_bit(codec, array):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    ours, theirs = codec.encode(array), codec.encode(torch.tensor(array))
    assert theirs[0].dtype in (torch.float16, torch.bfloat16)
    words = theirs[0].view(torch.int16).numpy().view(np.uint16)
    numbers = ~np.isnan(array)
    assert np.array_equal(ours[0].view(np.uint16)[numbers], words[numbers])
    a, b = codec.decode(ours), codec.decode(theirs).numpy()
    assert a.dtype == b.dtype == np.float32
    assert a.shape == b.shape == array.shape
    assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_half_the_bytes_and_nothing_changed_in_place(codec):
    array = np.full((3, 5), 1e30, np.float32)
    (small,) = codec.encode(array)
    assert small.nbytes * 2 == array.nbytes
    assert (array == np.float32(1e30)).all()


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_infinities_and_nan_stay_even_when_saturating(codec):
    decoded = codec.decode(codec.encode(np.array([np.inf, -np.inf, np.nan], np.float32)))
    assert np.array_equal(decoded, [np.inf, -np.inf, np.nan], equal_nan=True)


def test_a_finite_float64_beyond_float32_saturates_too():
    for codec in (Float16(saturate=True), BFloat16(saturate=True)):
        assert np.isfinite(codec.decode(codec.encode(np.array([1e300, -1e300])))).all()


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_integers_are_refused(codec):
    with pytest.raises(TypeError, match="int64"):
        codec.encode(np.arange(3))
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(TypeError, match="int64"):
        codec.encode(torch.arange(3))


def test_words_of_another_type_are_not_taken_for_bfloat16():
    with pytest.raises(TypeError, match="float32"):
        BFloat16().decode((np.zeros(3, np.float32),))
