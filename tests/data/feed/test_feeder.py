"""A feeder is called again after its connection ended, and given up only where that has no sense."""

from __future__ import annotations

import queue
import socket
import time

import pytest
from data.feed.test_terms import OFFER, UNIT

from trainfleet.data.feed.feeder import Feeder
from trainfleet.errors import NotAdmitted, PeerError
from trainfleet.net import line
from trainfleet.net.channel import Channel

OFFERED = {"streams": {"training": OFFER.to_plain()}, "host": "cpu-0", "workers": 3}


class Heard:
    """What a trainer's pool is told, in order; and the other ends of the connections."""

    def __init__(self, offer=OFFERED, refuse=None):
        self.told, self.ends, self.offer, self.refuse = queue.Queue(), queue.Queue(), offer, refuse
        self.feeder = Feeder("cpu-0:7700", self.connect, self, Channel)

    def connect(self, timeout, closing):
        ours, theirs = socket.socketpair()
        if self.refuse is not None:
            raise self.refuse
        end = Channel(theirs)
        end.send("offer", self.offer)
        self.ends.put(end)
        return ours

    def joined(self, feeder, told):
        self.told.put(("joined", told))

    def left(self, feeder, reason):
        self.told.put(("left", str(reason)))

    def made(self, feeder, message, num_bytes):
        self.told.put(("made", message.head["task"], num_bytes > 0))

    def alive(self, feeder, progress):
        self.told.put(("alive", progress))

    def given_up(self, feeder, reason):
        self.told.put(("given up", str(reason)))

    def next(self):
        return self.told.get(timeout=10)

    def end(self):
        self.feeder.close()
        self.feeder.join(10)
        assert not self.feeder.is_alive
        while not self.ends.empty():
            self.ends.get().close()


@pytest.fixture
def heard():
    heard = Heard()
    yield heard
    heard.end()


def test_it_says_what_it_has_is_asked_and_answers(heard):
    kind, told = heard.next()
    assert kind == "joined" and told.streams == {"training": OFFER} and (told.host, told.workers) == ("cpu-0", 3)
    end = heard.ends.get(timeout=5)
    heard.feeder.ask(5, UNIT)
    assert end.recv(5).head == {"task": 5, "arrived": [], **UNIT.to_plain()}
    heard.feeder.arrived(5, 0.25)
    heard.feeder.ask(6, UNIT)
    assert end.recv(5).head == {"task": 6, "arrived": [[5, 0.25]], **UNIT.to_plain()}
    end.send("alive", {"progress": 7})
    assert heard.next() == ("alive", 7)
    end.send("made", {"task": 5, "skipped": []}, [1])
    assert heard.next() == ("made", 5, True)
    heard.feeder.forget()
    assert end.recv(5).kind == "forget"
    heard.feeder.say_bye()
    assert end.recv(5).kind == "bye"
    end.send("made", {"task": 6, "skipped": []}, [1] * 1000)  # was on its way
    end.close()
    heard.feeder.join(5)
    assert not heard.feeder.is_alive, "nothing broke off, and it does not connect again"


def test_it_is_called_again(heard):
    for _ in range(3):
        assert heard.next()[0] == "joined"
        heard.ends.get(timeout=5).close()
        assert heard.next()[0] == "left"


def test_a_pool_that_fails_on_what_it_is_told_is_not_left_waiting(heard):
    heard.next()
    heard.made = lambda feeder, message, num_bytes: 1 / 0
    heard.ends.get(timeout=5).send("made", {"task": 5}, [1])
    assert heard.next() == ("given up", "division by zero")


def test_closed_while_it_connects_it_ends():
    heard = Heard({"not": "an offer"})
    heard.end()


def test_silence_ends_the_connection(monkeypatch):
    monkeypatch.setattr(line, "SILENCE_SECONDS", 0.3)
    heard = Heard()
    try:
        assert heard.next()[0] == "joined"
        begun = time.monotonic()
        assert heard.next()[0] == "left" and time.monotonic() - begun < 3
    finally:
        heard.end()


def test_it_says_that_the_trainer_is_alive(monkeypatch):
    monkeypatch.setattr(line, "ALIVE_SECONDS", 0.1)
    heard = Heard()
    try:
        heard.next()
        end = heard.ends.get(timeout=5)
        assert end.recv(5).kind == "alive"
        end.close()
    finally:
        heard.end()


@pytest.mark.parametrize(
    "offer",
    [{}, {**OFFERED, "streams": {}}, {**OFFERED, "workers": "3"}, {**OFFERED, "streams": {"training": {"samples": 1}}}],
)
def test_an_offer_that_is_none_ends_the_connection(offer):
    heard = Heard(offer)
    try:
        assert heard.next()[0] == "left"
    finally:
        heard.end()


@pytest.mark.parametrize("refuse", [NotAdmitted("another secret"), PeerError("no way"), ValueError("strange")])
def test_what_will_not_get_better_is_given_up(refuse):
    heard = Heard(refuse=refuse)
    assert heard.next() == ("given up", str(refuse))
    heard.end()
