"""The pool of feeders: an answer is checked before it counts, and asked for is what somebody can have."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest
from data.feed.test_stock import TERMS
from data.feed.test_terms import OFFER

from trainfleet.data.feed.feeder import Told
from trainfleet.data.feed.feeders import Feeders
from trainfleet.data.feed.terms import Unit
from trainfleet.errors import DataError, NotAdmitted, PeerError
from trainfleet.net.channel import Message
from trainfleet.net.peers import Ways


class Known:
    """A feeder that notes what is asked of it."""

    def __init__(self, name):
        self.name, self.asked, self.told = name, [], []

    def ask(self, task, unit):
        self.asked.append((task, unit))

    def forget(self):
        self.asked.append("forget")

    def arrived(self, task, seconds):
        self.told.append((task, seconds))


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr("trainfleet.data.feed.feeders.Feeder", Known)
    pool = Feeders(Ways(), timeout=timedelta(seconds=1), buffer_bytes=1 << 20)
    yield pool
    pool.close()


def made(task, body=None, **head):
    return Message("made", {"task": task, "skipped": [], "idle": False} | head, body)


def unit(begin, end):
    return Unit(0, begin, end, TERMS)


def told(**change):
    return Told({"training": replace(OFFER, **change)}, "cpu-0", 1)


def test_a_batch_comes_from_whoever_has_room(pool):
    one, other = Known("one"), Known("other")
    pool.submit(0, unit(0, 8))
    pool.joined(one, told())
    assert [task for task, _ in one.asked] == [0]
    pool.joined(other, told())
    for task in range(1, 8):
        pool.submit(task, unit(8 * task, 8 * task + 8))
    assert len(one.asked) == len(other.asked) == 4
    assert pool.depth == 8
    pool.made(one, made(0, "batch", skipped=[[3, "rotten"]]), 100)
    assert pool.receive(0).batch == "batch"
    pool.left(other, PeerError("gone"))
    assert pool.lost == 1 and pool.repeated == 4
    for task in range(1, 8):
        for number, _ in list(one.asked):
            pool.made(one, made(number, number), 100)
        assert pool.receive(task).batch == task
    pool.drop([])
    assert one.asked[-1:] != ["forget"], "a pool forgets with those whom it started"


@pytest.mark.parametrize(
    "answer",
    [
        Message("made", {}, None),
        made("0"),
        made(0, skipped=None),
        made(0, skipped=[["3", "rotten"]]),
        made(0, skipped=[[3]]),
        made(0, seconds=[1.0, 2.0]),
        made(0, seconds=[1.0, 2.0, 3.0, -1.0]),
        made(0, seconds=[1, 2, 3, "4"]),
        Message("failed", {"error": "?"}, None),
    ],
)
def test_an_answer_that_is_none_is_the_feeders_fault(pool, answer):
    one = Known("one")
    pool.joined(one, told())
    pool.submit(0, unit(0, 8))
    with pytest.raises(PeerError):
        pool.made(one, answer, 0)


def test_a_failure_is_raised_where_its_batch_is_wanted(pool):
    one = Known("one")
    pool.joined(one, told())
    pool.submit(0, unit(0, 8))
    pool.made(one, Message("failed", {"task": 0, "error": "41 is rotten", "hint": "look"}, None), 0)
    with pytest.raises(DataError, match="41 is rotten") as caught:
        pool.receive(0)
    assert caught.value.hint == "look"


@pytest.mark.parametrize(("change", "word"), [({"samples": 11}, "11 samples"), ({"digest": "ff"}, "other samples")])
def test_a_feeder_with_something_else_is_not_admitted(pool, change, word):
    pool.joined(Known("one"), told())
    pool.joined(Known("alike"), told(size=5, seed=9, source="elsewhere"))
    with pytest.raises(NotAdmitted, match=word):
        pool.joined(Known("other"), told(**change))
    with pytest.raises(NotAdmitted, match="evaluation"):
        pool.joined(Known("third"), Told({"training": OFFER, "evaluation": OFFER}, "cpu-2", 1))


def test_what_cannot_be_read_here_ends_the_wait(pool):
    pool.submit(0, unit(0, 8))
    pool.given_up(Known("one"), DataError("a Pair may not be built"))
    with pytest.raises(DataError, match="Pair"):
        pool.receive(0)


def test_without_feeders_the_wait_ends_at_the_deadline_with_the_reason(pool):
    pool.submit(0, unit(0, 8))
    pool.left(Known("one"), PeerError("it was unplugged"))
    with pytest.raises(PeerError, match="unplugged"):
        pool.receive(0)
    assert pool.seconds_waited >= 1


def test_a_feeder_that_is_alive_and_makes_nothing_is_not_waited_for_for_ever(pool):
    one = Known("one")
    pool.joined(one, told())
    pool.submit(0, unit(0, 8))
    begun, stop = time.monotonic(), threading.Event()

    def say_alive(progress):
        while not stop.wait(0.1):
            pool.alive(one, progress())

    for progress, least in ((lambda: 7, 1.0), (lambda: min(time.monotonic() - begun, 4.0), 3.0)):
        stop.clear()
        speaker = threading.Thread(target=say_alive, args=(progress,))
        speaker.start()
        waited = time.monotonic()
        try:
            with pytest.raises(PeerError, match="the 1 that are here made no progress"):
                pool.receive(0)
        finally:
            stop.set()
            speaker.join()
        assert time.monotonic() - waited >= least, "while samples are made there, it is waited for"


def test_what_a_feeder_took_and_the_way_took_comes_with_the_batch(pool):
    one = Known("one")
    pool.joined(one, told())
    pool.submit(0, unit(0, 8))
    time.sleep(0.05)
    pool.made(one, made(0, "batch", seconds=[0.01, 0.005, 0.002, 0.001]), 1234)
    found = pool.receive(0)
    assert found.spent == (0.01, 0.005) and found.num_bytes == 1234
    assert (found.way.queued, found.way.outbox) == (0.002, 0.001) and 0.03 <= found.way.transit < 0.5
    assert one.told == [(0, pytest.approx(found.way.transit, abs=1e-6))]
    pool.submit(1, unit(8, 16))
    pool.made(one, made(1, "batch"), 10)
    assert pool.receive(1).way is None, "who does not say is not timed"
