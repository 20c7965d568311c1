from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.checkpoint.sealed import Damaged, RunningDigest, digest_of, seal, unseal

BODY = {"step": 3, "name": "ü", "nested": {"x": [1.5, None]}}


def test_what_was_sealed_is_unsealed():
    assert unseal(seal("note", BODY), "x", "note") == BODY


def test_every_single_bit_counts():
    sealed = seal("note", BODY)
    for bit in range(len(sealed) * 8):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged, match="the-file"):
            unseal(bytes(damaged), "the-file", "note")


@pytest.mark.parametrize("change", [lambda s: s[:-1], lambda s: s + b" ", lambda s: b""])
def test_other_lengths_and_contents_are_damage(change):
    with pytest.raises(Damaged):
        unseal(change(seal("note", BODY)), "x", "note")


def test_a_sealed_file_of_another_kind_is_damage():
    with pytest.raises(Damaged, match=r"the-file: .*'letter'"):
        unseal(seal("letter", BODY), "the-file", "note")


@given(st.lists(st.binary(), max_size=5))
def test_a_digest_does_not_depend_on_the_chunks(chunks):
    running = RunningDigest()
    for chunk in chunks:
        running.update(chunk)
    assert str(running) == digest_of(b"".join(chunks))
