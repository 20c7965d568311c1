"""A question travels as it is, and what cannot be asked is refused."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.errors import ConfigError, PeerError
from trainfleet.serve.terms import Terms

TERMS = Terms(task="predict", top_k=3, confidence=0.25, probabilities=True)


def test_terms_come_back_as_they_were():
    assert Terms.from_plain(json.loads(json.dumps(TERMS.to_plain()))) == TERMS
    assert Terms.from_plain(Terms(task="validate").to_plain()) == Terms(task="validate")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"task": "train"}, "task"),
        ({"top_k": 0}, "top_k"),
        ({"confidence": 1.5}, "confidence"),
        ({"confidence": -0.1}, "confidence"),
        ({"confidence": float("nan")}, "confidence"),
    ],
)
def test_terms_that_cannot_be_are_refused_at_home_and_from_afar(wrong, said):
    with pytest.raises(ConfigError, match=said):
        Terms(**{**TERMS.to_plain(), **wrong})
    with pytest.raises(PeerError, match=said):
        Terms.from_plain({**TERMS.to_plain(), **wrong})


@pytest.mark.parametrize("wrong", [{"more": 1}, {"top_k": True}, {"top_k": 1.0}, {"confidence": 0}, {"task": None}])
def test_terms_of_other_types_are_refused(wrong):
    with pytest.raises(PeerError):
        Terms.from_plain({**TERMS.to_plain(), **wrong})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)


@given(JSON, st.sampled_from(sorted(TERMS.to_plain())))
def test_whatever_is_told_is_understood_or_refused(told, key):
    for value in (told, {**TERMS.to_plain(), key: told}):
        with contextlib.suppress(PeerError):
            assert isinstance(Terms.from_plain(value), Terms)
