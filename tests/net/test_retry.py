from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from datetime import timedelta

import pytest

from trainfleet.errors import NotAdmitted, PeerError
from trainfleet.net import retry
from trainfleet.net.retry import pauses, wait_for


def test_pauses_grow_to_a_bound_and_differ_by_chance():
    first, second = (list(itertools.islice(pauses(0.1, 1.0), 8)) for _ in range(2))
    assert first != second
    for pause, top in zip(first, [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0, 1.0]):
        assert top / 2 <= pause <= top


def test_what_fails_at_first_is_tried_again_until_it_works():
    lefts = []

    def attempt(left: float) -> str:
        lefts.append(left)
        if len(lefts) < 4:
            raise PeerError("not yet.")
        return "there"

    assert wait_for("the feeder", attempt, timeout=timedelta(seconds=5)) == "there"
    assert lefts == sorted(lefts, reverse=True) and len(lefts) == 4


def test_the_budget_ends_it_with_the_last_reason_and_its_remedy():
    def attempt(_: float) -> None:
        raise PeerError("The port is closed.", hint="Start it.")

    begin = time.monotonic()
    with pytest.raises(PeerError, match=r"^The feeder could not be reached within 0\.3 s\. The port is closed\.$") as e:
        wait_for("the feeder", attempt, timeout=timedelta(seconds=0.3))
    assert e.value.hint == "Start it." and time.monotonic() - begin < 0.5


def test_a_try_that_the_deadline_cuts_short_does_not_hide_the_reason():
    tries = []

    def attempt(left: float) -> None:
        tries.append(left)
        if len(tries) < 3:
            raise PeerError("The port is closed.")
        time.sleep(left)
        raise PeerError("No answer in time.")

    with pytest.raises(PeerError, match="The port is closed"):
        wait_for("the feeder", attempt, timeout=timedelta(seconds=0.4))
    assert len(tries) == 3


def test_one_who_is_not_admitted_does_not_ask_again():
    tries = []

    def attempt(left: float) -> None:
        tries.append(left)
        raise NotAdmitted("wrong secret.")

    with pytest.raises(NotAdmitted):
        wait_for("the feeder", attempt, timeout=timedelta(seconds=5))
    assert len(tries) == 1


def test_a_wait_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(retry, "_SPEAK_SECONDS", 0.1)

    def attempt(_: float) -> None:
        raise PeerError("The port is closed.")

    with caplog.at_level(logging.INFO), pytest.raises(PeerError):
        wait_for("the feeder at cpu-0:7700", attempt, timeout=timedelta(seconds=0.6))
    (line,) = caplog.messages
    assert "for the feeder at cpu-0:7700. The port is closed." in line


def test_closing_ends_a_wait():
    closing = threading.Event()

    def attempt(_: float) -> None:
        closing.set()
        raise PeerError("gone.")

    begin = time.monotonic()
    with pytest.raises(PeerError, match="gone"):
        wait_for("the feeder", attempt, timeout=timedelta(seconds=30), closing=closing)
    assert time.monotonic() - begin < 1


def test_the_chance_of_the_program_is_left_alone():
    random.seed(7)
    before = random.getstate()
    assert len(list(itertools.islice(pauses(), 5))) == 5
    assert random.getstate() == before, "a run that is fed could not be repeated"
