"""A line hears what its peer says, connects again when it ends, and is given up only where that has no sense."""

from __future__ import annotations

import queue
import socket
import time

import pytest
from left_behind import nothing_left_behind

from trainfleet.errors import NotAdmitted, PeerError
from trainfleet.net import line as line_module
from trainfleet.net.channel import Channel
from trainfleet.net.line import Line


class Heard:
    """What is told on the line's thread, in order, and the peer's ends of its connections."""

    def __init__(self, **settings):
        self.told, self.ends, self.refuse = queue.Queue(), queue.Queue(), None
        self.line = Line("peer", self.connect, self, Channel, **settings)

    def connect(self, timeout, closing):
        ours, theirs = socket.socketpair()
        self.ends.put(Channel(theirs))
        return ours

    def joined(self, message):
        self.told.put(("joined", message.kind))
        if self.refuse is not None:
            raise self.refuse

    def heard(self, message, num_bytes):
        self.told.put(("heard", message.kind, num_bytes > 0))

    def left(self, reason):
        self.told.put(("left", str(reason)))

    def given_up(self, reason):
        self.told.put(("given up", str(reason)))

    def next(self):
        return self.told.get(timeout=10)

    def peer(self):
        end = self.ends.get(timeout=10)
        end.send("hello")
        return end


@pytest.fixture
def heard():
    with nothing_left_behind():
        made = Heard()
        made.line.start()
        yield made
        made.line.close()
        made.line.join(10)
        while not made.ends.empty():
            made.ends.get().close()


def test_words_go_both_ways_and_a_bye_ends_it(heard):
    with heard.peer() as peer:
        assert heard.next() == ("joined", "hello")
        heard.line.say("ask", {"task": 1}, [1, 2])
        assert peer.recv(5) == ("ask", {"task": 1}, [1, 2])
        peer.send("answer")
        assert heard.next() == ("heard", "answer", True)
        heard.line.say_bye()
        assert peer.recv(5).kind == "bye"
    heard.line.join(5)
    assert not heard.line.is_alive and heard.told.empty(), "an end that was asked for is no loss"


def test_it_connects_again_unless_the_peer_is_not_admitted(heard):
    for _ in range(2):
        with heard.peer():
            assert heard.next()[0] == "joined"
        assert heard.next()[0] == "left"
    heard.refuse = NotAdmitted("other weights")
    with heard.peer():
        assert heard.next()[0] == "joined" and heard.next() == ("given up", "other weights")
        heard.line.join(5)
        assert not heard.line.is_alive


def test_a_peer_that_never_joins_is_tried_ever_more_seldom(heard):
    heard.refuse = PeerError("what cannot be")
    begun = time.monotonic()
    for _ in range(6):
        with heard.peer():
            assert heard.next()[0] == "joined" and heard.next()[0] == "left"
    assert time.monotonic() - begun > 0.7, "at least half of 0.05 + 0.1 + 0.2 + 0.4 + 0.8 s"


def test_once_is_once():
    heard = Heard(again=False)
    heard.refuse = PeerError("what cannot be")
    heard.line.start()
    with heard.peer():
        assert heard.next()[0] == "joined" and heard.next() == ("left", "what cannot be")
        heard.line.join(5)
        assert not heard.line.is_alive and heard.ends.empty()


def test_it_says_that_it_is_alive_and_silence_ends_it(monkeypatch, heard):
    monkeypatch.setattr(line_module, "ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(line_module, "SILENCE_SECONDS", 0.3)
    with heard.peer() as peer:
        assert heard.next()[0] == "joined"
        assert peer.recv(5).kind == "alive"
        assert heard.next()[0] == "left"


def test_a_line_without_a_connection_says_nothing():
    Heard().line.say("ask")
