"""A service is sent as much as it has room for, and no word to it keeps anybody waiting."""

from __future__ import annotations

import queue
import socket
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
from left_behind import nothing_left_behind
from serve.made import VALIDATE
from serve.test_offer import OFFER

from trainfleet.errors import NotAdmitted
from trainfleet.net.channel import Channel
from trainfleet.serve.respondent import Question, Respondent


class Heard:
    """What is told of one service, in order, and the service's ends of its connections."""

    def __init__(self, room=100, words=None, again=True):
        self.told, self.ends, self.refuse = queue.Queue(), queue.Queue(), None
        self.words = replace(OFFER, room=room).to_plain() if words is None else words
        self.respondent = Respondent("gpu-0:7800", self.connect, self, Channel, again=again)

    def connect(self, timeout, closing):
        ours, theirs = socket.socketpair()
        end = Channel(theirs)
        end.send("offer", self.words)
        self.ends.put(end)
        return ours

    def joined(self, respondent, offer):
        self.told.put(("joined", offer))
        if self.refuse:
            raise self.refuse

    def left(self, respondent, reason):
        self.told.put(("left", str(reason)))

    def answered(self, respondent, message, num_bytes):
        self.told.put(("answered", message.head["task"], num_bytes > 0))

    def unsaid(self, respondent, task, reason):
        self.told.put(("unsaid", task, str(reason)))

    def alive(self, respondent, progress):
        self.told.put(("alive", progress))

    def given_up(self, respondent, reason):
        self.told.put(("given up", str(reason)))

    def next(self):
        return self.told.get(timeout=10)

    def service(self):
        return self.ends.get(timeout=10)

    def ask(self, task, weight, batch=None):
        self.respondent.ask(task, Question(batch, VALIDATE, weight))

    def end(self):
        self.respondent.close()
        self.respondent.join(10)
        assert not self.respondent.is_alive
        while not self.ends.empty():
            self.ends.get().close()


@pytest.fixture
def heard():
    with nothing_left_behind():
        heard = Heard()
        assert heard.next()[0] == "joined"
        yield heard
        heard.end()


def asked(end, seconds=5.0):
    while (message := end.recv(seconds)).kind == "alive":
        pass
    return message


def test_it_is_asked_answers_and_says_that_it_is_alive(heard):
    end = heard.service()
    heard.ask(5, 10, {"x": 1})
    assert asked(end) == ("ask", {"task": 5, "terms": VALIDATE.to_plain()}, {"x": 1})
    end.send("alive", {"progress": 7})
    assert heard.next() == ("alive", 7)
    end.send("answer", {"task": 5}, {})
    assert heard.next() == ("answered", 5, True)
    heard.respondent.say_bye()
    assert asked(end).kind == "bye"
    end.close()
    heard.respondent.join(5)
    assert not heard.respondent.is_alive and heard.told.empty()


def test_no_more_is_sent_than_it_has_room_for_but_one_batch_always(heard):
    end = heard.service()
    for task, weight in enumerate([60, 40, 30, 1000, 1]):
        heard.ask(task, weight)
    assert [asked(end).head["task"] for _ in range(2)] == [0, 1]
    with pytest.raises(TimeoutError):
        end.recv(0.1)
    end.send("failed", {"task": 0})
    assert asked(end).head["task"] == 2
    end.send("answer", {"task": 2}, {})
    with pytest.raises(TimeoutError):
        end.recv(0.1)
    end.send("answer", {"task": 1}, {})
    assert asked(end).head["task"] == 3, "larger than the room, and alone"
    with pytest.raises(TimeoutError):
        end.recv(0.1)
    end.send("answer", {"task": 3}, {})
    assert asked(end).head["task"] == 4


def test_what_is_forgotten_is_not_sent_and_makes_room(heard):
    end = heard.service()
    for task in range(5):
        heard.ask(task, 60)
    assert asked(end).head["task"] == 0
    heard.respondent.forget()
    assert asked(end).kind == "forget"
    heard.ask(9, 90)
    assert asked(end).head["task"] == 9


def test_after_a_loss_it_begins_anew(heard):
    heard.ask(0, 60)
    heard.ask(1, 60)
    end = heard.service()
    assert asked(end).head["task"] == 0
    end.close()
    assert heard.next()[0] == "left" and heard.next()[0] == "joined"
    heard.ask(0, 60)
    again = heard.service()
    assert asked(again).head["task"] == 0
    again.send("answer", {"task": 0}, {})
    with pytest.raises(TimeoutError):
        again.recv(0.1)


def test_what_one_that_is_gone_had_is_not_kept_for_it():
    heard, batch = Heard(again=False), np.zeros(4)
    heard.next()
    kept = weakref.ref(batch)
    heard.ask(0, 10, batch)
    del batch
    end = heard.service()
    asked(end)
    end.close()
    assert heard.next()[0] == "left"
    deadline = time.monotonic() + 5
    while kept() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    heard.end()


def test_a_batch_that_cannot_travel_is_told_and_takes_no_room(heard):
    heard.ask(0, 100, object())
    kind, task, reason = heard.next()
    assert (kind, task) == ("unsaid", 0) and "object" in reason
    heard.ask(1, 100)
    assert asked(heard.service()).head["task"] == 1


def test_who_asks_and_ends_does_not_wait_for_a_service_that_does_not_read(heard):
    begun = time.monotonic()
    for task in range(3):
        heard.ask(task, 1, np.zeros(1 << 22, np.uint8))
    heard.respondent.forget()
    heard.respondent.close()
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize("words", [{}, {"digest": 1}, replace(OFFER).to_plain() | {"room": -5}])
def test_an_offer_that_is_none_ends_the_connection(words):
    heard = Heard(words=words, again=False)
    assert heard.next()[0] == "left"
    heard.end()


@pytest.mark.parametrize(("kind", "head"), [("answer", {}), ("answer", {"task": "1"}), ("ask", {}), ("offer", {})])
def test_what_services_do_not_say_ends_the_connection(heard, kind, head):
    heard.service().send(kind, head)
    assert heard.next()[0] == "left"


def test_one_that_may_not_build_our_batches_or_is_not_admitted_is_given_up():
    heard = Heard()
    assert heard.next()[0] == "joined"
    heard.service().send("refused", {"error": "no class Pair"})
    kind, reason = heard.next()
    assert kind == "given up" and "no class Pair" in reason
    heard.end()
    heard = Heard()
    heard.next()
    heard.refuse = NotAdmitted("other weights")
    heard.service().close()
    assert [heard.next()[0] for _ in range(3)] == ["left", "joined", "given up"]
    heard.end()
