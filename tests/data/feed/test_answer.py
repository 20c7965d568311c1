"""An answer of a feeder is taken for what it says, or refused; what differs between feeders is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from data.feed.test_terms import OFFER
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.data.feed.answer import difference_of, parsed_answer, timed
from trainfleet.data.samples import Made
from trainfleet.errors import DataError, PeerError
from trainfleet.net.channel import Message

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.fixed_dictionaries({}, optional={"task": JSON, "skipped": JSON, "seconds": JSON, "error": JSON}))
def test_whatever_a_feeder_says_is_a_batch_an_error_or_its_fault(head):
    for kind in ("made", "failed"):
        message = Message(kind, head, "batch")
        try:
            task, found = parsed_answer(message)
            found = timed(found, message, 1.0, 10)
        except PeerError:
            continue
        assert type(task) is int and isinstance(found, Made if kind == "made" else DataError)


def test_times_come_with_the_batch_and_the_rest_is_the_way():
    message = Message("made", {"task": 1, "skipped": [], "seconds": [0.1, 0.2, 0.3, 0.1]}, "batch")
    made = timed(parsed_answer(message)[1], message, 1.0, 77)
    assert made.spent == (0.1, 0.2) and made.num_bytes == 77
    assert made.way == pytest.approx((0.3, 0.1, 0.3))
    assert timed(made, message, 0.5, 77).way.transit == 0, "clocks that are not quite alike"


def test_the_first_stream_that_differs_is_named():
    ours = {"evaluation": OFFER, "training": OFFER}
    assert difference_of("a", dict(ours), ours) is None
    assert difference_of("a", ours | {"training": replace(OFFER, size=3, seed=9)}, ours) is None
    assert "makes other samples for evaluation" in str(
        difference_of("a", {name: replace(OFFER, digest="ff") for name in ours}, ours)
    )
    assert "has no stream 'evaluation'" in str(difference_of("a", {"training": OFFER}, ours))
