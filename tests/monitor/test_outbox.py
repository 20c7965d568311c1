from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence

import pytest

from trainfleet.monitor.outbox import Outbox


def test_what_is_put_is_delivered_in_order_before_it_is_closed() -> None:
    got: list[int] = []
    outbox: Outbox[int] = Outbox("test", got.extend)
    for number in range(5000):
        outbox.put(number)
    assert outbox.close(10) and got == list(range(5000))


def test_nobody_waits_for_a_delivery_and_what_finds_no_room_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    go, got = threading.Event(), []

    def deliver(items: Sequence[int]) -> None:
        go.wait(10)
        got.extend(items)

    outbox: Outbox[int] = Outbox("The pigeon", deliver, most_waiting=10, most_together=1)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="trainfleet"):
        for number in range(1000):
            outbox.put(number)
        assert time.monotonic() - began < 1
        (warning,) = caplog.messages
        assert warning.startswith("The pigeon: 1 could not be delivered (10 wait already)")
        go.set()
        assert outbox.close(10)
    assert got == list(range(len(got))) and 10 <= len(got) <= 11
    assert caplog.messages[1:] == [f"The pigeon: {1000 - len(got)} were lost in all."]


def test_what_cannot_be_delivered_is_said_once_and_the_next_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    got: list[int] = []

    def deliver(items: Sequence[int]) -> None:
        if items[0] < 3:
            raise ConnectionError("nobody\nis there")
        got.extend(items)

    outbox: Outbox[int] = Outbox("The pigeon", deliver, most_together=1)
    for number in range(5):
        outbox.put(number)
    assert outbox.close(10) and got == [3, 4]
    assert [record.getMessage().partition(". ")[0] for record in caplog.records] == [
        "The pigeon: 1 could not be delivered (ConnectionError: nobody)",
        "The pigeon: 3 were lost in all.",
    ]


def test_a_delivery_that_never_returns_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    never = threading.Event()
    outbox: Outbox[int] = Outbox("The pigeon", lambda items: never.wait(30) and None, most_together=2)
    for number in range(5):
        outbox.put(number)
    time.sleep(0.05)
    began = time.monotonic()
    assert not outbox.close(0.1)
    assert time.monotonic() - began < 1 and caplog.messages == ["The pigeon: 5 were lost in all."]
    never.set()


def test_a_forked_process_delivers_nothing() -> None:
    got: list[int] = []
    outbox: Outbox[int] = Outbox("test", got.extend)
    outbox.put(1)
    if (child := os.fork()) == 0:
        outbox.put(2)
        os._exit(0 if outbox.close(5) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert outbox.close(5) and got == [1]
