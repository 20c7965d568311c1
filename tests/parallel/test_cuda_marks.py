"""Whose time a rank counts: on a CPU the host's own. With a GPU: tests/device/test_cuda_marks.py."""

from __future__ import annotations

from typing import Any

import pytest

from trainfleet.parallel import cuda_marks
from trainfleet.parallel.cuda_marks import CudaMarks, stopwatch_for
from trainfleet.stopwatch import DeviceStopwatch, Stopwatch, timed


class Event:
    """As torch's, of a stream that has come to `reached`."""

    now, reached, made = 0.0, 0.0, 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1
        self._at = 0.0

    def record(self, stream: Any) -> None:
        self._at = Event.now

    def query(self) -> bool:
        return self._at <= Event.reached

    def elapsed_time(self, later: Event) -> float:
        return (later._at - self._at) * 1e3


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_marks.torch.cuda, "Event", Event)
    monkeypatch.setattr(cuda_marks.torch.cuda, "current_stream", lambda device: device)
    Event.now = Event.reached = 0.0
    Event.made = 0


def test_a_processor_is_timed_by_the_host() -> None:
    assert type(stopwatch_for("cpu")) is Stopwatch
    assert type(stopwatch_for("cuda:0")) is DeviceStopwatch


def test_events_are_read_when_the_stream_has_come_to_them_and_are_used_again(gpu: None) -> None:
    with DeviceStopwatch(CudaMarks("cuda:0")) as watch:
        for _ in range(50):
            with timed("forward"):
                Event.now += 0.5
            before = Event.reached
            assert watch.take()["forward"] == pytest.approx(0.5 * (before > 0.0))  # that of the step before
            Event.reached = Event.now
    assert Event.made < 10


def test_a_mark_that_is_not_reached_has_no_time(gpu: None) -> None:
    marks = CudaMarks("cuda:0")
    first = marks.mark()
    Event.now = 1.0
    second = marks.mark()
    assert marks.seconds(first, second) is None
    Event.reached = 1.0
    assert marks.seconds(first, second) == 1.0
