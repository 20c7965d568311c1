from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.errors import PeerError
from trainfleet.net.compression import MEASURED_BYTES, NAMES, PREFIX, Compression, available, decode, encode, name_at

HAVE = available()
codecs = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in HAVE, reason=f"{name} is not installed"))
        for name in NAMES
    ],
)
ZEROS = np.zeros(1 << 20, np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)


def over(bytes_per_second: float, common: list[str] | None = None) -> Compression:
    compression = Compression(HAVE if common is None else common)
    compression.learn(MEASURED_BYTES, MEASURED_BYTES / bytes_per_second)
    return compression


@codecs
def test_what_was_made_smaller_comes_back(name):
    data = np.repeat(np.arange(5000, dtype=np.int32), 7).view(np.uint8)
    into = np.empty_like(data)
    coded = np.frombuffer(encode(name, data), np.uint8)
    decode(name, coded, into)
    assert coded.nbytes < data.nbytes and np.array_equal(into, data)


@codecs
@pytest.mark.parametrize("announced", [10, 1 << 12])
def test_a_payload_of_another_length_is_refused(name, announced):
    """Also one that would fill the memory of the host, if it were believed."""
    bomb = np.frombuffer(encode(name, np.zeros(1 << 26, np.uint8)), np.uint8)
    short = np.frombuffer(encode(name, np.zeros(5, np.uint8)), np.uint8)
    for data in (bomb, short):
        with pytest.raises(PeerError, match=name):
            decode(name, data, np.empty(announced, np.uint8))


@codecs
@given(data=st.binary(max_size=300))
@settings(max_examples=150)
def test_garbage_is_refused(name, data):
    with pytest.raises(PeerError, match=name):
        decode(name, np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8), np.empty(5000, np.uint8))


@pytest.mark.skipif(not HAVE, reason="neither zstandard nor lz4 is installed")
def test_a_slow_link_is_worth_it_and_a_fast_one_is_not():
    coded = over(1e6).made_smaller([ZEROS], ZEROS.nbytes)
    assert coded is not None
    place, length = PREFIX.unpack(coded.prefix)
    assert name_at(place) in HAVE and length == coded.data.nbytes < 10_000
    assert over(1e9).made_smaller([ZEROS], ZEROS.nbytes) is None


def test_what_does_not_get_smaller_travels_as_it_is():
    assert over(1e6).made_smaller([NOISE], NOISE.nbytes) is None


def test_nothing_is_coded_before_the_link_was_measured_or_that_the_peer_cannot_read():
    compression = Compression(HAVE)
    compression.learn(1000, 1.0)
    assert compression.bytes_per_second is None
    assert compression.made_smaller([ZEROS], ZEROS.nbytes) is None
    assert over(1e6, []).made_smaller([ZEROS], ZEROS.nbytes) is None
    assert over(1e6, ["unheard of"]).made_smaller([ZEROS], ZEROS.nbytes) is None


def test_the_rate_follows_the_link():
    compression = over(1e9)
    for _ in range(20):
        compression.learn(1 << 23, (1 << 23) / 5e6)
    assert compression.bytes_per_second == pytest.approx(5e6, rel=0.05)


def test_an_unknown_codec_is_refused():
    with pytest.raises(PeerError, match="codec 9, which nobody has"):
        name_at(9)
