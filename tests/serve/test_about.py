"""A folder of predictions says what it is of, and is not mixed with others."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.errors import ConfigError, DataError, PeerError
from trainfleet.serve.about import About
from trainfleet.serve.terms import Terms

ABOUT = About(weights="0f", terms=Terms(task="predict", top_k=2), first="aa", samples=10, names=("a", "b"))
DONE = replace(ABOUT, rows=10, kept=7)


def test_it_comes_back_as_it_was():
    for about in (ABOUT, DONE, replace(ABOUT, names=None, samples=None)):
        assert About.from_json(about.to_json(), Path()) == about
    assert DONE.is_done and not ABOUT.is_done and DONE.digest == ABOUT.digest


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"weights": "1f"}, "other weights"),
        ({"terms": Terms(task="predict", top_k=3)}, "top_k 2 and not 3"),
        ({"samples": 11}, "10 samples and not 11"),
        ({"first": "bb"}, "other data"),
    ],
)
def test_other_predictions_are_told_apart_in_words(other, said):
    wanted = replace(ABOUT, **other)
    assert wanted.digest != ABOUT.digest
    with pytest.raises(ConfigError, match=said) as refused:
        ABOUT.refuse_other(wanted, Path("folder"))
    assert "--fresh" in refused.value.hint
    ABOUT.refuse_other(replace(ABOUT, names=None), Path("folder"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)


@given(JSON, st.sampled_from(sorted(json.loads(DONE.to_json()))))
def test_whatever_is_told_is_understood_or_refused(told, key):
    for value in (told, {**json.loads(DONE.to_json()), key: told}):
        with contextlib.suppress(ValueError, PeerError):
            assert isinstance(About.from_plain(value), About)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", DONE.to_json().replace("predictions 1", "predictions 2"), "[" * 100_000]
)
def test_what_is_no_description_is_named(text):
    with pytest.raises(DataError, match="does not say which predictions"):
        About.from_json(text, Path("folder/_predictions.json"))
