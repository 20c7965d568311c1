from __future__ import annotations

import socket
import threading
import time

import pytest

from trainfleet.net.loop import Door, Loop


@pytest.fixture
def loop():
    loop = Loop("of a test", at_end=lambda: None)
    loop.start()
    yield loop
    loop.close()


def test_what_is_due_runs_in_order_and_about_a_millisecond_late_at_most(loop):
    late: list[tuple[int, float]] = []

    def plan() -> None:
        for number in (3, 1, 2):
            when = time.monotonic() + number * 0.0207
            loop.at(when, lambda number=number, when=when: late.append((number, time.monotonic() - when)))

    loop.call(plan)
    time.sleep(0.15)
    assert [number for number, _ in late] == [1, 2, 3]
    assert min(seconds for _, seconds in late) > -0.0001
    assert min(seconds for _, seconds in late) < 0.005, "a busy host may hold up one or two, not all"


def test_calls_run_in_its_thread_and_give_back_what_they_gave(loop):
    assert loop.call(lambda: threading.current_thread().name) == "of a test"


def test_after_its_end_calls_run_where_they_are_made():
    ended = []
    loop = Loop("of a test", at_end=lambda: ended.append(threading.current_thread().name))
    loop.start()
    loop.close()
    loop.close()
    assert ended == ["of a test"]
    assert loop.call(lambda: threading.current_thread()) is threading.current_thread()
    assert "of a test" not in [thread.name for thread in threading.enumerate()]


def test_a_held_door_hears_what_it_was_asked_for_only_afterwards(loop):
    near, far = socket.socketpair()
    heard = threading.Event()
    door = loop.call(lambda: Door(near, loop))

    def listen() -> None:
        door.on_readable = lambda: (near.recv(10), heard.set())  # type: ignore[assignment,func-returns-value]
        door.hold(held=True)
        door.ask(read=True)

    loop.call(listen)
    far.send(b"word")
    assert not heard.wait(0.05)
    loop.call(lambda: door.hold(held=False))
    assert heard.wait(2)
    loop.call(door.close)
    far.close()


def test_a_defect_ends_the_thread_and_says_so(caplog):
    ended = threading.Event()
    loop = Loop("of a test", at_end=ended.set)
    loop.at(time.monotonic(), lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    loop.start()
    assert ended.wait(2)
    loop.close()
    assert "The thread of a test has failed" in caplog.text and "ZeroDivisionError" in caplog.text
