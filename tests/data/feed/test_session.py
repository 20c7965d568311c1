"""A feeder answers each question of a trainer once, survives what a trainer says, and lets go of one that is gone."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace

import pytest
from data.feed.made import Numbers, local, same
from data.feed.test_stock import TERMS

from trainfleet.data.crew import Workers
from trainfleet.data.feed import session as session_module
from trainfleet.data.feed.session import Session
from trainfleet.data.feed.stock import Stock
from trainfleet.data.feed.terms import Unit
from trainfleet.data.feed.workshop import Workshop
from trainfleet.errors import PeerError
from trainfleet.net.channel import Channel


class Fed:
    """A session on a thread, and the trainer's end of it."""

    def __init__(self, source=None):
        ours, theirs = socket.socketpair()
        stock = Stock({"training": local(source)})
        self.workshop = Workshop(Workers(maker=stock, workers=1))
        self.ended = None
        self.session = Session(Channel(ours), stock, self.workshop)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.trainer = Channel(theirs)
        self.thread.start()
        assert self.trainer.recv(10).head == {"streams": {}}

    def _run(self):
        try:
            self.session.run({"streams": {}})
            self.ended = "well"
        except PeerError as exc:
            self.ended = str(exc)

    def ask(self, task, begin, **terms):
        unit = Unit(0, begin, begin + 8, replace(TERMS, **terms))
        self.trainer.send("ask", {"task": task, **unit.to_plain()})

    def answer(self):
        while (message := self.trainer.recv(20)).kind == "alive":
            pass
        return message

    def end(self):
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.ended


@pytest.fixture
def fed():
    fed = Fed()
    yield fed
    fed.trainer.close()
    fed.end()
    fed.workshop.close()


def test_what_is_asked_for_is_made(fed):
    plain = local()
    wanted = {task: next(plain) for task in range(4)}
    for task in wanted:
        fed.ask(task, 8 * task)
    for _ in wanted:
        message = fed.answer()
        assert message.kind == "made" and message.head["skipped"] == []
        assert same(message.body, wanted[message.head["task"]])
    fed.trainer.send("bye")
    assert fed.end() == "well" and fed.session.num_units == 4 and fed.session.num_bytes > 400


def test_what_it_does_not_have_is_an_answer_too(fed):
    fed.ask(1, 96)
    message = fed.answer()
    assert message.kind == "failed" and message.head["task"] == 1 and "100 samples" in message.head["error"]


@pytest.mark.parametrize(
    ("kind", "head", "word"),
    [
        ("ask", {}, "number of a task"),
        ("ask", {"task": 1, "epoch": 0}, "belong"),
        ("ask", {"task": 1, "arrived": [[1, "soon"]]}, "told of arrivals"),
        ("give me", {}, "trainers do not say"),
    ],
)
def test_what_cannot_be_ends_the_connection(fed, kind, head, word):
    fed.trainer.send(kind, head)
    assert word in fed.end()
    with pytest.raises(PeerError):
        fed.answer()


def test_more_than_may_be_asked_for_ends_the_connection(fed, monkeypatch):
    monkeypatch.setattr(session_module, "MOST_ASKED", 0)
    fed.ask(1, 0)
    assert "more than 0" in fed.end()


def test_what_was_forgotten_is_not_sent():
    class Slow(Numbers):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    fed = Fed(Slow())
    for task in range(10):
        fed.ask(task, 8 * task)
    fed.trainer.send("forget")
    fed.ask(77, 0)
    answers = [fed.answer().head["task"] for _ in range(1)]
    while answers[-1] != 77:
        answers.append(fed.answer().head["task"])
    assert len(answers) < 4
    fed.trainer.close()
    assert "closed" in fed.end()
    fed.workshop.close()


def test_a_trainer_that_says_nothing_is_let_go(monkeypatch):
    monkeypatch.setattr(session_module, "SILENCE_SECONDS", 0.3)
    fed = Fed()
    assert "said nothing for 0.3 s" in fed.end()
    fed.workshop.close()


def test_a_feeder_says_that_it_is_alive(monkeypatch):
    monkeypatch.setattr(session_module, "ALIVE_SECONDS", 0.1)
    fed = Fed()
    kind, head, _ = fed.trainer.recv(5)
    assert kind == "alive" and head == {"progress": 0}
    fed.ask(1, 0)
    while (message := fed.trainer.recv(5)).kind != "made":
        pass
    while (message := fed.trainer.recv(5)).head["progress"] < 8:
        pass
    assert message.kind == "alive"
    fed.trainer.close()
    fed.end()
    fed.workshop.close()
