from __future__ import annotations

import contextlib
import json
import struct
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_digest

from trainfleet.errors import ConfigError, DataError, NotAdmitted, PeerError
from trainfleet.net.frames import DIGEST, HEADER, MAX_KNOWN, Limits, pack, read_head, read_header

LIMITS = Limits(max_bytes=10_000, max_head_bytes=1000, max_arrays=4)


def header(head: bytes = b"{}", *, version: int = 1, flags: int = 0, arrays: int = 0, num_bytes: int = 0) -> bytes:
    """As a sender may write it who knows the digests."""
    facts = struct.pack("<4sBBHIIQ8s", b"TFfr", version, flags, 0, len(head), arrays, num_bytes, xxh3_64_digest(head))
    return facts + xxh3_64_digest(facts)


def head_of(tree: object) -> bytes:
    return b'{"k":"x","h":{}}\n' + json.dumps(tree).encode()


def test_a_structure_that_is_known_is_checked_by_header_and_digest_alone():
    out = pack("batch", {"epoch": 3}, {"x": np.ones((2, 3))}, LIMITS)
    facts, known = read_header(out.header(DIGEST), LIMITS), {}
    first, again = (read_head(facts, out.head, LIMITS, {}, known) for _ in range(2))
    assert first == again and len(known) == 1
    other = read_header(header(out.head, arrays=1, num_bytes=128), LIMITS)
    with pytest.raises(PeerError, match="announces 128 bytes, and its arrays take 64"):
        read_head(other, out.head, LIMITS, {}, known)
    for n in range(100):
        body = pack("b", {}, n, LIMITS)
        read_head(read_header(body.header(0), LIMITS), body.head, LIMITS, {}, known)
    assert len(known) <= MAX_KNOWN


def test_a_structure_that_was_sent_before_gives_the_same_frame():
    written = {}
    numbers = np.arange(6)
    bodies = [
        {"x": numbers, "y": numbers},
        {"x": numbers.astype(">i8"), "y": numbers},
        {"x": numbers.reshape(2, 3), "y": numbers.reshape(3, 2).T},
        {"y": numbers, "x": numbers},
        {"x": numbers, "y": 3},
        {},
    ]
    for body in bodies * 2:
        plain, again = pack("b", {"n": 1}, body, LIMITS), pack("b", {"n": 1}, body, LIMITS, written)
        assert again.head == plain.head and again.num_bytes == plain.num_bytes
        assert [array.tobytes() for array in again.arrays] == [array.tobytes() for array in plain.arrays]
    assert len(written) == 5, "what is not only arrays is looked at anew"
    for _ in range(2):
        with pytest.raises(DataError):
            pack("b", {}, {"x": np.array([None])}, LIMITS, written)
    for n in range(1, 100):
        pack("b", {}, {str(n): numbers}, LIMITS, written)
    assert len(written) <= MAX_KNOWN


def test_words_behind_a_head_are_refused():
    data = b'{"k":"x","h":{}} {}\n{}'
    with pytest.raises(PeerError, match="there is more behind it"):
        read_head(read_header(header(data), LIMITS), data, LIMITS, {})


def test_a_message_is_what_was_packed():
    out = pack("batch", {"epoch": 3}, {"x": np.ones((2, 3))}, LIMITS)
    facts = read_header(out.header(DIGEST), LIMITS)
    assert (facts.flags, facts.num_bytes, facts.num_arrays) == (DIGEST, 64, 1)
    incoming = read_head(facts, out.head, LIMITS, {})
    assert (incoming.kind, incoming.head, incoming.num_bytes) == ("batch", {"epoch": 3}, 64)
    assert len(out.header(0)) == HEADER.size == 40


@given(st.integers(0, 40 * 8 - 1))
def test_a_flipped_bit_of_the_header_is_found(bit):
    data = bytearray(pack("k", {}, np.ones(3), LIMITS).header(DIGEST))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PeerError):
        read_header(data, LIMITS)


@given(st.binary(min_size=40, max_size=40))
@settings(max_examples=200)
def test_garbage_is_no_header(data):
    with pytest.raises(PeerError, match="not a frame"):
        read_header(data, LIMITS)


@given(
    st.recursive(
        st.none() | st.integers() | st.text() | st.sampled_from(["a", "<f4", "T", "d", "D", "N", "l", "b"]),
        lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=2), below, max_size=3),
    )
)
@settings(max_examples=300)
def test_a_head_of_any_json_is_read_or_refused(tree):
    for head in (json.dumps(tree).encode()[:1000], head_of(tree)[:1000]):
        facts = read_header(header(head, arrays=4, num_bytes=640), LIMITS)
        with contextlib.suppress(PeerError, DataError):
            assert read_head(facts, head, LIMITS, {}).num_bytes == 640


@pytest.mark.parametrize(
    "head", [b"[" * 1000, b"\xff", b"", b"9" * 999, b'{"k":1,"h":{}}\n1', b'{"k":"","h":3}\n1', b"null"]
)
def test_heads_that_cannot_be_are_refused(head):
    with pytest.raises(PeerError, match="A frame has a head"):
        read_head(read_header(header(head), LIMITS), head, LIMITS, {})


def test_a_damaged_head_is_found():
    facts = read_header(header(b'{"k":"a","h":{}}\n1'), LIMITS)
    with pytest.raises(PeerError, match="head was damaged"):
        read_head(facts, b'{"k":"b","h":{}}\n1', LIMITS, {})


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"num_bytes": 10_001}, "arrays of 10,001 bytes, and the limit is 10,000"),
        ({"head": b" " * 1001}, "a head of 1,001 bytes, and the limit is 1,000"),
        ({"arrays": 5}, "5 arrays, and the limit is 4"),
        ({"flags": 128}, "flags 0x80"),
    ],
)
def test_what_is_beyond_the_limits_is_refused(facts, words):
    with pytest.raises(PeerError, match=words):
        read_header(header(**facts), LIMITS)


def test_another_version_is_not_admitted():
    with pytest.raises(NotAdmitted, match="speaks version 2 of frames, and we version 1"):
        read_header(header(version=2), LIMITS)


@pytest.mark.parametrize(
    ("arrays", "num_bytes", "words"), [(0, 64, "more than 0 arrays"), (1, 0, "more than 0 bytes"), (1, 128, "take 64")]
)
def test_a_header_that_does_not_fit_its_head_is_refused(arrays, num_bytes, words):
    head = head_of(["a", "<f4", [3]])
    with pytest.raises(PeerError, match=words):
        read_head(read_header(header(head, arrays=arrays, num_bytes=num_bytes), LIMITS), head, LIMITS, {})


@pytest.mark.parametrize(
    ("head", "body", "words"),
    [
        ({}, np.zeros(10_001, np.uint8), "arrays of 10,048 bytes, and the limit is 10,000"),
        ({"x": "y" * 1000}, None, "a head of"),
        ({}, [b""] * 5, "pieces counting 5, and the limit is 4"),
        ({"x": object()}, None, "cannot be written as JSON"),
        ({}, [10**5000], "cannot be written as JSON"),
    ],
)
def test_a_sender_keeps_its_own_limits(head, body, words):
    with pytest.raises(DataError, match=words):
        pack("k", head, body, LIMITS)


def test_limits_check_themselves():
    with pytest.raises(ConfigError, match="max_arrays of a connection is 0"):
        Limits(max_arrays=0)
    with pytest.raises(ConfigError, match="stall"):
        Limits(stall=timedelta(0))
