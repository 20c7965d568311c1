"""Several streams over one pool of feeders: their tasks do not meet, and forgetting one leaves the other."""

from __future__ import annotations

from datetime import timedelta

import pytest
from data.feed.test_feeders import Known, made, told
from data.feed.test_stock import TERMS

from trainfleet.data.feed.feeders import Feeders
from trainfleet.data.feed.lane import Lane
from trainfleet.data.sampler import Span
from trainfleet.net.peers import Ways


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr("trainfleet.data.feed.feeders.Feeder", Known)
    pool = Feeders(Ways(), timeout=timedelta(seconds=1), buffer_bytes=1 << 20)
    yield pool
    pool.close()


def test_tasks_of_two_lanes_do_not_meet(pool):
    one, other, feeder = Lane(pool, TERMS), Lane(pool, TERMS), Known("feeder")
    pool._peers._members.append(feeder)
    pool.joined(feeder, told())
    one.submit(0, Span(0, 0, 8))
    other.submit(0, Span(0, 8, 16))
    assert [(number, unit.begin, unit.terms) for number, unit in feeder.asked] == [(0, 0, TERMS), (1, 8, TERMS)]
    for number in (1, 0):
        pool.made(feeder, made(number, f"batch {number}"), 100)
    assert (one.receive(0).batch, other.receive(0).batch) == ("batch 0", "batch 1")
    one.submit(1, Span(0, 16, 24))
    other.submit(1, Span(0, 24, 32))
    one.forget()
    assert "forget" not in feeder.asked, "the other lane's would be forgotten too"
    pool.made(feeder, made(2, "nobody wants it"), 100)
    pool.made(feeder, made(3, "batch 3"), 100)
    assert other.receive(1).batch == "batch 3"
    other.submit(2, Span(0, 32, 40))
    other.close()
    assert feeder.asked[-1] == "forget"
    pool._peers._members.clear()  # it has no connection to be closed


def test_a_shared_pool_is_closed_by_the_last(pool):
    pool.share()
    pool.close()
    assert pool.is_open
    pool.close()
    assert not pool.is_open
