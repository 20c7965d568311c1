"""The pool of services: batches go where there is room, and an answer is checked before it counts."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from serve.made import VALIDATE
from serve.test_offer import OFFER

from trainfleet.errors import ConfigError, DataError, NotAdmitted, PeerError
from trainfleet.net.channel import Message
from trainfleet.net.peers import Ways
from trainfleet.serve import respondents as respondents_module
from trainfleet.serve.respondent import Question
from trainfleet.serve.respondents import Respondents


class Known:
    """A service that notes what is asked of it."""

    def __init__(self, name):
        self.name, self.asked = name, []

    def ask(self, task, question):
        self.asked.append(task)


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(respondents_module, "Respondent", Known)
    pool = Respondents(Ways(), timeout=timedelta(seconds=0.6), window_bytes=1000)
    yield pool
    pool.close()


def submit(pool, *tasks, weight=100):
    for task in tasks:
        pool.submit(task, Question(None, VALIDATE, weight))


def answer(task, body=None, **head):
    return Message("answer", {"task": task, "idle": False} | head, {} if body is None else body)


def test_a_batch_goes_to_whoever_has_room_and_comes_back_to_others(pool):
    one, other = Known("one"), Known("other")
    submit(pool, 0)
    pool.joined(one, OFFER)
    assert one.asked == [0]
    pool.joined(other, OFFER)
    submit(pool, *range(1, 8))
    assert len(one.asked) == len(other.asked) == 4
    pool.answered(one, answer(0, {"a": 1}), 10)
    assert pool.has(0) and pool.receive(0) == {"a": 1} and not pool.has(0)
    pool.left(other, PeerError("gone"))
    assert (pool.lost, pool.repeated, pool.connected) == (1, 4, 1)
    while pool.connected and len(set(one.asked)) < 8:
        for task in list(one.asked):
            pool.answered(one, answer(task), 10)
    assert set(one.asked) == set(range(8))


def test_no_more_is_wanted_than_fits_or_than_services_have_use_for(pool):
    assert pool.wants_more
    submit(pool, 0, 1)
    assert not pool.wants_more, "nobody is here"
    pool.joined(Known("one"), OFFER)
    assert pool.wants_more
    submit(pool, *range(2, 8))
    assert not pool.wants_more, "twice its room"
    pool.joined(Known("other"), OFFER)
    assert pool.wants_more and pool.held_bytes == 800
    submit(pool, 8, 9)
    assert not pool.wants_more, "1000 bytes are here"


def test_the_first_weights_are_the_measure(pool):
    pool.joined(Known("one"), OFFER)
    pool.joined(Known("alike"), replace(OFFER, device="cpu", room=1))
    with pytest.raises(NotAdmitted, match="other weights of Sequential"):
        pool.joined(Known("other"), replace(OFFER, digest="other"))
    assert pool.offer() == OFFER and pool.connected == 2


def test_a_failure_is_what_it_was_there(pool):
    one = Known("one")
    pool.joined(one, OFFER)
    submit(pool, 0, 1, 2)
    for task, kind in enumerate(["ConfigError", "SystemExit"]):
        head = {"task": task, "kind": kind, "error": "top_k", "hint": "less"}
        pool.answered(one, Message("failed", head, None), 0)
    found = [pool.receive(task) for task in range(2)]
    assert [type(each) for each in found] == [ConfigError, DataError] and found[0].hint == "less"
    pool.unsaid(one, 2, DataError("cannot travel"))
    assert "cannot travel" in str(pool.receive(2))


@pytest.mark.parametrize("body", [[1], "text", 5])
def test_an_answer_that_is_none_is_the_services_fault(pool, body):
    one = Known("one")
    pool.joined(one, OFFER)
    submit(pool, 0)
    with pytest.raises(PeerError, match="not arrays by name"):
        pool.answered(one, answer(0, body), 0)
    assert not pool.has(0)


def test_a_late_batch_that_is_waited_for_is_asked_of_another_too(pool, monkeypatch):
    monkeypatch.setattr("trainfleet.net.lease.LATE_SECONDS", 0.01)
    slow, quick = Known("slow"), Known("quick")
    pool.joined(slow, OFFER)
    submit(pool, 0)
    pool.joined(quick, OFFER)
    quick.ask = lambda task, question: pool.answered(quick, answer(task, {"by": "quick"}), 10)
    assert pool.receive(0) == {"by": "quick"} and slow.asked == [0] and pool.repeated == 1
    pool.answered(slow, answer(0, {"by": "slow"}), 10)
    assert not pool.has(0) and pool.held_bytes == 0, "the first answer counts"


def test_the_wait_ends_at_the_deadline_with_the_reason(pool):
    submit(pool, 0)
    pool.left(Known("one"), PeerError("it was unplugged"))
    with pytest.raises(PeerError, match="unplugged"):
        pool.receive(0)
    assert pool.seconds_waited >= 0.6
