"""What a run was limited by is what its time went into, and the remedy is that of the largest part."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.monitor.limit import Limit, in_words, shares_of

SECONDS = st.floats(0, 1e4)


@given(SECONDS, SECONDS, st.dictionaries(st.sampled_from(["source", "transform", "network", "data"]), SECONDS))
def test_shares_are_one_together(seconds: float, data_seconds: float, waits: dict[str, float]) -> None:
    shares = shares_of(seconds, data_seconds, waits)
    assert not shares if seconds == 0 else sum(shares.values()) == pytest.approx(1)
    assert all(share >= 0 for share in shares.values())


def told(story: Any, waits: dict[str, float], data_seconds: float, **fields: Any) -> Limit:
    limit = Limit()
    limit.update(story.step(1, data_seconds=0.1, waits={"data": 0.1}))
    for step in range(2, 12):
        limit.update(story.step(step, data_seconds=data_seconds, waits=waits, **fields))
    return limit


@pytest.mark.parametrize(
    ("waits", "data_seconds", "percentages", "sentence"),
    [
        ({"source": 0.04, "transform": 0.02}, 0.07, {"computing": 40, "source": 40, "transform": 20}, "Reading"),
        ({"source": 0.01, "transform": 0.02}, 0.03, {"computing": 70, "source": 10, "transform": 20}, "Transform"),
        ({"network": 0.03, "source": 0.01}, 0.04, {"computing": 60, "network": 30, "source": 10}, "data.on_device"),
        ({"network": 0.002}, 0.002, {"computing": 98, "network": 2}, "Computing is the limit"),
        ({}, 0.05, {"computing": 50, "data": 50}, "The batches are the limit: raise data.workers."),
    ],
)
def test_the_largest_part_names_the_limit(
    story: Any, waits: dict[str, float], data_seconds: float, percentages: dict[str, int], sentence: str
) -> None:
    limit = told(story, waits, data_seconds)
    assert limit.percentages == percentages and sentence in limit.sentence
    assert "feeders" not in limit.sentence.partition("limit:")[2] or "network" in waits


def test_more_feeders_help_where_there_are_feeders(story: Any) -> None:
    assert "start more feeders" in told(story, {"source": 0.05}, 0.05, received_bytes=7).sentence


def test_before_the_first_step_nothing_is_said(story: Any) -> None:
    assert Limit().percentages == {} and Limit().sentence == ""
    limit = Limit()
    limit.update(story.step(1, data_seconds=0.05))
    assert limit.percentages == {"computing": 50, "data": 50}


def test_the_largest_part_comes_first() -> None:
    assert in_words({"computing": 30, "source": 60, "network": 0, "transform": 10}) == (
        "60% source, 30% computing, 10% transform"
    )
