"""Batches of several owners are computed one at a time, in turn, and what fails is a sentence."""

from __future__ import annotations

import queue
import threading
import time

import pytest
from left_behind import nothing_left_behind
from serve.made import VALIDATE

from trainfleet.errors import ConfigError, DataError, OutOfMemory
from trainfleet.serve.turns import Turns, told_of


class Owner:
    def __init__(self, name):
        self.name, self.has_room, self.finished = name, True, queue.Queue()

    def next(self):
        return self.finished.get(timeout=10)


class Gate:
    """Computes only while it is open; notes what, in order."""

    def __init__(self):
        self.open, self.order = threading.Event(), []

    def __call__(self, batch, terms):
        assert self.open.wait(10)
        self.order.append(batch)
        if isinstance(batch, BaseException):
            raise batch
        return {"batch": batch}


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def turns(gate):
    with nothing_left_behind():
        turns = Turns(gate)
        yield turns
        gate.open.set()
        turns.close()
        turns.close()


def submit(turns, owner, *batches):
    for batch in batches:
        turns.submit(owner, batch, VALIDATE, owner.finished.put)


def test_owners_take_turns(turns, gate):
    one, other = Owner("one"), Owner("other")
    submit(turns, one, "a0")
    while turns.waiting:
        time.sleep(0.001)  # it is being computed
    submit(turns, one, "a1", "a2", "a3")
    submit(turns, other, "b0", "b1")
    assert turns.waiting == 5
    gate.open.set()
    assert [one.next().idle for _ in range(4)] == [False, False, False, True]
    assert [other.next().answer["batch"] for _ in range(2)] == ["b0", "b1"]
    assert gate.order == ["a0", "a1", "b0", "a2", "b1", "a3"]
    assert turns.progress == 6 and turns.num_failed == 0


def test_an_owner_without_room_waits_and_the_others_do_not(turns, gate):
    gate.open.set()
    full, free = Owner("full"), Owner("free")
    full.has_room = False
    submit(turns, full, "a")
    submit(turns, free, "b")
    assert free.next().answer == {"batch": "b"}
    time.sleep(0.05)
    assert full.finished.empty()
    full.has_room = True
    turns.look()
    assert full.next().answer == {"batch": "a"}


def test_what_was_forgotten_is_not_computed(turns, gate):
    gone, here = Owner("gone"), Owner("here")
    submit(turns, here, "first")
    while turns.waiting:
        time.sleep(0.001)
    submit(turns, gone, "a", "b")
    turns.forget(gone)
    submit(turns, here, "c")
    gate.open.set()
    assert here.next().answer == {"batch": "first"} and here.next().answer == {"batch": "c"}
    assert gate.order == ["first", "c"] and gone.finished.empty()


def test_a_failure_is_told_and_the_next_is_computed(turns, gate):
    gate.open.set()
    owner = Owner("one")
    submit(turns, owner, ValueError("mat1 and mat2 shapes cannot be multiplied"), SystemExit("bye"), "fine")
    failed = owner.next().answer
    assert isinstance(failed, DataError) and "ValueError: mat1 and mat2" in str(failed) and failed.__traceback__ is None
    assert "SystemExit: bye" in str(owner.next().answer)
    assert owner.next().answer == {"batch": "fine"}
    assert (turns.num_failed, turns.progress) == (2, 3) and turns.busy_seconds > 0


def test_what_a_model_raises_becomes_a_sentence():
    torch = pytest.importorskip("torch")
    for full in (MemoryError("no"), torch.cuda.OutOfMemoryError("Tried to allocate 2 GiB")):
        told = told_of(full)
        assert isinstance(told, OutOfMemory) and "memory of the service's device" in str(told)
    told = told_of(ConfigError("top_k is 9", hint="less"))
    assert type(told) is ConfigError and (str(told), told.hint) == ("top_k is 9", "less")
