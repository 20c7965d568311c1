"""A service answers each question of a client once, survives what a client says, and lets go of one that is gone."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from left_behind import nothing_left_behind
from serve.made import VALIDATE, Weighted, batches, local, same
from serve.test_offer import OFFER

from trainfleet.errors import PeerError
from trainfleet.net.channel import Channel
from trainfleet.serve import session as session_module
from trainfleet.serve.session import Session, weight_of
from trainfleet.serve.turns import Turns

TERMS = VALIDATE.to_plain()


class Asked:
    """A session on a thread, and the client's end of it."""

    def __init__(self, model=None, room=1 << 20, raw=False):
        ours, theirs = socket.socketpair()
        self.turns = Turns((model or Weighted()).answer)
        self.ended = None
        self.session = Session(Channel(ours), replace(OFFER, room=room), self.turns)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self.client = theirs if raw else Channel(theirs)
        if not raw:
            assert self.client.recv(10).head == replace(OFFER, room=room).to_plain()

    def _run(self):
        try:
            self.session.run()
            self.ended = "well"
        except PeerError as exc:
            self.ended = str(exc)

    def ask(self, task, batch, terms=TERMS):
        self.client.send("ask", {"task": task, "terms": terms}, batch)

    def answer(self):
        while (message := self.client.recv(20)).kind == "alive":
            pass
        return message

    def end(self):
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.ended

    def close(self):
        self.client.close()
        self.end()
        self.turns.close()


@pytest.fixture
def asked():
    with nothing_left_behind():
        asked = Asked()
        yield asked
        asked.close()


def test_what_is_asked_is_answered(asked):
    expected = local(5)
    for task, batch in enumerate(batches(5)):
        asked.ask(task, batch)
    for task in range(5):
        message = asked.answer()
        assert (message.kind, message.head["task"]) == ("answer", task) and same(message.body, expected[task])
    asked.client.send("bye")
    assert asked.end() == "well"
    assert (asked.session.num_batches, asked.session.num_rows, asked.session.held_bytes) == (5, 40, 0)
    assert asked.session.num_bytes > 5 * 1600


def test_a_failure_is_an_answer_too(asked):
    asked.ask(1, {"x": np.zeros(3, np.float32)})
    message = asked.answer()
    assert message.kind == "failed" and message.head["kind"] == "DataError" and "1 dimensions" in message.head["error"]
    asked.ask(2, {"x": np.zeros((0, 3), np.float32)})
    assert asked.answer().head["kind"] == "OutOfMemory"


@pytest.mark.parametrize(
    ("kind", "head", "word"),
    [
        ("ask", {}, "number of a task"),
        ("ask", {"task": "1", "terms": TERMS}, "number of a task"),
        ("ask", {"task": 1, "terms": {**TERMS, "top_k": 0}}, "cannot be"),
        ("ask", {"task": 1, "terms": None}, "belong"),
        ("offer", {}, "clients do not say"),
    ],
)
def test_what_cannot_be_ends_the_connection(asked, kind, head, word):
    asked.client.send(kind, head)
    assert word in asked.end()
    with pytest.raises(PeerError):
        asked.answer()


def test_a_task_is_asked_once_at_a_time():
    asked = Asked(Weighted(seconds=0.2))
    for _ in range(2):
        asked.ask(1, next(batches(1)))
    assert "task 1 twice" in asked.end()
    asked.close()


def test_what_may_not_be_built_is_said_before_the_end(asked):
    asked.ask(1, OFFER)
    message = asked.answer()
    assert message.kind == "refused" and "Offer" in message.head["error"]
    for _ in range(3):  # it is read to the end, so that an end does not overtake the words
        asked.ask(2, {"x": np.zeros(1 << 20, np.uint8)})
    asked.client.close()
    assert "may not build" in asked.end() and asked.turns.progress == 0


def test_no_more_is_read_than_there_is_room_for():
    model, wide = Weighted(), 1 << 18
    gate = threading.Event()
    compute, model.answer = model.answer, lambda batch, terms: gate.wait(20) and compute(batch, terms)
    asked = Asked(model, room=2 * wide)
    batch = {"x": np.zeros((16, wide // 64), np.float32)}

    def ask():
        for task in range(12):
            asked.ask(task, batch)

    sender = threading.Thread(target=ask, daemon=True)
    sender.start()
    time.sleep(0.3)
    assert sender.is_alive() and asked.session.held_bytes <= 3 * wide, "the room, and one that goes over"
    gate.set()
    for task in range(12):
        assert asked.answer().head["task"] == task
        assert asked.session.held_bytes <= 3 * wide
    sender.join(5)
    asked.close()


def test_no_more_is_computed_than_answers_may_wait():
    model = Weighted(wide=1 << 14)  # 1 MiB an answer of 8 rows
    asked = Asked(model, room=1 << 21)
    for task in range(40):
        asked.ask(task, {"x": np.zeros((8, 2), np.float32)})
    time.sleep(0.3)
    begun = model.asked
    assert begun <= 8, "two in our queue, one before, and what the kernel and a socket's buffers hold"
    for task in range(40):
        assert asked.answer().head["task"] == task
    asked.close()


def test_what_was_forgotten_is_neither_computed_nor_sent():
    model = Weighted(seconds=0.05)
    asked = Asked(model)
    for task, batch in enumerate(batches(20)):
        asked.ask(task, batch)
    asked.client.send("forget")
    asked.ask(77, next(batches(1)))
    seen = []
    while 77 not in seen:
        seen.append(asked.answer().head["task"])
    assert len(seen) < 6 and model.asked < 8 and asked.turns.waiting == 0
    asked.close()
    assert asked.session.held_bytes == 0


def test_a_client_that_breaks_off_while_there_is_no_room_is_let_go():
    asked = Asked(Weighted(seconds=0.3), room=1)
    for task, batch in enumerate(batches(3)):
        asked.ask(task, batch)
    asked.client.close()
    begun = time.monotonic()
    assert "closed" in asked.end() or "gone" in asked.ended
    assert time.monotonic() - begun < 2 and asked.turns.waiting == 0
    asked.close()


def test_what_a_client_that_has_gone_asked_is_not_computed():
    model = Weighted(seconds=0.1)
    asked = Asked(model)
    for task, batch in enumerate(batches(30)):
        asked.ask(task, batch)
    while model.asked < 2:
        time.sleep(0.01)
    asked.client.close()
    asked.end()
    assert asked.turns.waiting == 0 and model.asked < 10
    asked.close()


def test_a_client_that_says_nothing_is_let_go_and_one_that_waits_hears_a_sign(monkeypatch):
    monkeypatch.setattr(session_module, "SILENCE_SECONDS", 0.4)
    monkeypatch.setattr(session_module, "ALIVE_SECONDS", 0.1)
    asked = Asked()
    asked.ask(1, next(batches(1)))
    kinds = [asked.client.recv(5) for _ in range(3)]
    assert kinds[-1].kind == "alive" and kinds[-1].head == {"progress": 1}
    assert "said nothing for 0.4 s" in asked.end()
    asked.close()


def test_the_weight_of_a_batch_is_that_of_its_arrays():
    assert weight_of({"x": np.zeros((8, 1024), np.float32), "y": [np.zeros(1024, np.int64)]}) == 5 * 8192
    assert weight_of([]) == 4096, "a place in a queue is not free"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
WORDS = st.sampled_from(["ask", "forget", "alive", "bye", "offer", "", "answer"])


@settings(max_examples=120)
@given(
    WORDS,
    st.fixed_dictionaries({}, optional={"task": JSON, "terms": JSON, "more": JSON}),
    st.sampled_from([None, {"x": np.zeros((2, 2))}, [1], "text", {"x": 1}]),
)
def test_whatever_a_client_says_the_service_ends_or_goes_on(kind, head, body):
    asked = Asked()
    try:
        asked.client.send(kind, head, body)
        with suppress(PeerError):  # it may have ended already
            asked.client.send("bye")
        assert asked.end() is not None
    finally:
        asked.close()


@pytest.mark.parametrize("seed", range(10))
def test_bytes_that_are_no_words_end_the_connection(seed):
    asked = Asked(raw=True)
    asked.client.sendall(os.urandom(200))
    assert "cannot be" in asked.end()
    asked.close()
