"""What travels between trainer and feeder comes back as it was, and what cannot be is refused."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.data.feed.terms import Offer, Terms, Unit
from trainfleet.errors import PeerError

TERMS = Terms(stream="training", size=4, rank=1, world_size=2, seed=7, shuffle=True, short="drop", bad="raise")
UNIT = Unit(3, 8, 16, TERMS)
OFFER = Offer(samples=10, size=4, seed=0, shuffle=True, short="keep", bad="skip", source="ten", digest="0f", plain=True)


def test_units_and_offers_come_back_as_they_were():
    assert Unit.from_plain(json.loads(json.dumps(UNIT.to_plain()))) == UNIT
    assert Offer.from_plain(json.loads(json.dumps(OFFER.to_plain()))) == OFFER
    assert UNIT.size == 8


@pytest.mark.parametrize(
    "wrong",
    [
        {"epoch": -1},
        {"end": 8},
        {"begin": True},
        {"end": 1 << 60},
        {"more": 1},
        {"terms": None},
        {"terms": {**UNIT.to_plain()["terms"], "size": 0}},
        {"terms": {**UNIT.to_plain()["terms"], "rank": 2}},
        {"terms": {**UNIT.to_plain()["terms"], "short": "cut"}},
        {"terms": {**UNIT.to_plain()["terms"], "shuffle": 1}},
        {"terms": {**UNIT.to_plain()["terms"], "seed": 1 << 70}},
    ],
)
def test_a_unit_that_cannot_be_is_refused(wrong):
    with pytest.raises(PeerError):
        Unit.from_plain({**UNIT.to_plain(), **wrong})


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"size": "4"}, {"bad": "maybe"}, {"digest": None}])
def test_an_offer_that_cannot_be_is_refused(wrong):
    with pytest.raises(PeerError):
        Offer.from_plain({**OFFER.to_plain(), **wrong})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)


@given(JSON, st.sampled_from(sorted(UNIT.to_plain())))
def test_whatever_is_told_is_understood_or_refused(told, key):
    for parse, value in ((Unit.from_plain, told), (Unit.from_plain, {**UNIT.to_plain(), key: told})):
        with contextlib.suppress(PeerError):
            parse(value)
    with contextlib.suppress(PeerError):
        Offer.from_plain(told)
