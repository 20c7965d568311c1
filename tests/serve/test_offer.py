"""An offer comes through as it was, and nothing else does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.errors import PeerError
from trainfleet.serve.offer import Offer

OFFER = Offer(digest="abc", model="Sequential", device="cuda:0", classes=10, room=1 << 28)
WORDS = OFFER.to_plain()
ANYTHING = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5)


def test_it_comes_through():
    assert Offer.from_plain(WORDS) == OFFER


@pytest.mark.parametrize("wrong", [{"room": 0}, {"classes": -1}, {"digest": ""}, {"digest": "a" * 201}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(PeerError, match="offers what cannot be"):
        replace(OFFER, **wrong)


@pytest.mark.parametrize("told", [None, [], {}, WORDS | {"more": 1}, WORDS | {"room": "1"}, WORDS | {"classes": True}])
def test_other_words_are_refused(told):
    with pytest.raises(PeerError):
        Offer.from_plain(told)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(WORDS)), ANYTHING) | ANYTHING)
def test_garbage_is_a_sentence(told):
    try:
        found = Offer.from_plain({**WORDS, **told} if isinstance(told, dict) else told)
    except PeerError:
        return
    assert Offer.from_plain(found.to_plain()) == found
