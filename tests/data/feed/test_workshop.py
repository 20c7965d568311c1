"""Units of many owners are made in turn by one crew, and a failure is the unit's, not the workshop's."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from trainfleet.data.crew import Workers
from trainfleet.data.feed.workshop import Workshop
from trainfleet.data.sampler import Span
from trainfleet.data.samples import Made
from trainfleet.errors import DataError


class Maker:
    """Position 13 fails, 66 kills its worker; the rest is its own batch."""

    def make(self, span, *, progress, poison):
        progress(span.begin)
        if span.begin == 13:
            raise DataError("13 is rotten")
        if span.begin == 66:
            os.kill(os.getpid(), signal.SIGKILL)
        return Made(span.begin)


@pytest.fixture(params=[1, 2])
def workshop(request):
    shop = Workshop(Workers(maker=Maker(), workers=request.param, restarts=2))
    yield shop
    shop.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "trainfleet-workshop"]


def ordered(shop, owner, begins):
    answers = queue.Queue()
    for begin in begins:
        shop.submit(owner, Span(0, begin, begin + 1), lambda finished, begin=begin: answers.put((begin, finished)))
    return answers


def test_each_unit_is_answered_and_a_failure_is_its_own(workshop):
    answers = ordered(workshop, "a", [1, 13, 2])
    found = dict(answers.get(timeout=20) for _ in range(3))
    assert found[1].made.batch == 1 and found[2].made.batch == 2
    assert isinstance(found[13].made, DataError)


def test_owners_take_turns(workshop):
    gate = threading.Event()
    workshop.submit("gate", Span(0, 0, 1), lambda finished: gate.wait(10))
    order = queue.Queue()
    for owner, begins in (("long", range(20)), ("short", range(3))):
        for begin in begins:
            workshop.submit(owner, Span(0, begin, begin + 1), lambda finished, owner=owner: order.put(owner))
    gate.set()
    owners = [order.get(timeout=20) for _ in range(23)]
    assert owners.index("short") < 6 and max(n for n, owner in enumerate(owners) if owner == "short") < 16


def test_what_an_owner_forgets_is_not_made(workshop):
    gate = threading.Event()
    workshop.submit("gate", Span(0, 0, 1), lambda finished: gate.wait(10))
    gone = ordered(workshop, "gone", range(200))
    workshop.forget("gone")
    gate.set()
    assert ordered(workshop, "here", [5]).get(timeout=20)[1].made.batch == 5
    assert gone.qsize() < 10


def test_a_worker_that_dies_is_replaced_and_its_unit_named():
    shop = Workshop(Workers(maker=Maker(), workers=1, restarts=5))
    try:
        answers = ordered(shop, "a", [66, 7])
        found = dict(answers.get(timeout=30) for _ in range(2))
        assert isinstance(found[66].made, DataError) and "sample 66" in str(found[66].made)
        assert ordered(shop, "a", [8]).get(timeout=30)[1].made.batch == 8, "the workshop goes on"
        assert len([child for child in psutil.Process().children() if child.pid in shop.pids]) == 1
    finally:
        shop.close()


def test_it_says_when_nothing_else_is_asked_for(workshop):
    answers = ordered(workshop, "a", [1])
    assert answers.get(timeout=20)[1].idle


def test_a_program_that_does_not_close_it_ends_all_the_same():
    program = (
        "from data.feed.made import local\n"
        "from trainfleet.data.feed import DataService\n"
        "service = DataService(local(workers=2), address='127.0.0.1:0').open()\n"
        "print(*service.worker_pids)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert not [pid for pid in map(int, done.stdout.split()) if psutil.pid_exists(pid)]
