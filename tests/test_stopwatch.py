"""Phases are exclusive, add up to the whole, and cost nothing where nobody measures."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from trainfleet.stopwatch import PHASES, DeviceStopwatch, Stopwatch, marked, timed


class Clock:
    """Stands still unless it is told to go on."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("trainfleet.stopwatch.perf_counter", lambda: clock.now)
    return clock


def test_a_moment_belongs_to_the_innermost_phase(time: Clock) -> None:
    with Stopwatch() as watch:
        with timed("forward"):
            time.sleep(0.02)
            with timed("communication"):
                time.sleep(0.04)
            time.sleep(0.02)
        time.sleep(0.01)
        taken = watch.take()
    assert list(taken) == list(PHASES)
    assert taken["forward"] == pytest.approx(0.04)
    assert taken["communication"] == pytest.approx(0.04)
    assert taken["other"] == pytest.approx(0.01)
    assert sum(taken.values()) == pytest.approx(0.09)


def test_the_phases_add_up_to_the_time_between_two_looks(time: Clock) -> None:
    with Stopwatch() as watch:
        watch.take()
        for phase in PHASES:
            time.sleep(0.5)
            with timed(phase):
                time.sleep(1.0)
        begun = watch.taken_at
        assert sum(watch.take().values()) == pytest.approx(1.5 * len(PHASES)) == watch.taken_at - begun
        assert sum(watch.take().values()) == 0.0


def test_an_open_phase_goes_on_after_a_look(time: Clock) -> None:
    with Stopwatch() as watch, timed("data"):
        watch.take()
        time.sleep(0.01)
        assert watch.phase == "data"
        assert watch.take()["data"] >= 0.00999


def test_an_evaluation_is_taken_whole(time: Clock) -> None:
    with Stopwatch() as watch:
        with timed("evaluation"), timed("forward"), timed("communication"):
            time.sleep(0.01)
        taken = watch.take()
    assert taken["evaluation"] >= 0.00999
    assert taken["forward"] == taken["communication"] == 0.0


def test_an_error_closes_its_phase() -> None:
    with Stopwatch() as watch:
        with pytest.raises(ValueError), timed("forward"):
            raise ValueError
        assert watch.phase == "other"


def test_without_a_watch_nothing_is_measured_and_threads_have_their_own(time: Clock) -> None:
    with timed("forward"):  # nobody measures
        pass
    with Stopwatch() as watch:

        def elsewhere() -> None:
            with timed("backward"):
                time.sleep(0.01)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert watch.take()["backward"] == 0.0


def test_one_inside_another_takes_over_for_a_while(time: Clock) -> None:
    with Stopwatch() as outer:
        with Stopwatch() as inner, timed("forward"):
            time.sleep(0.01)
        assert inner.take()["forward"] >= 0.00999
        assert outer.take()["forward"] == 0.0
        with timed("forward"):
            time.sleep(0.01)
        assert outer.take()["forward"] >= 0.00999


class Device:
    """Works off a queue, an order after the other, at its own pace; the host never waits for it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._free_at = 0.0

    def order(self, seconds: float) -> None:
        self._free_at = max(self._free_at, self._clock.now) + seconds

    def mark(self) -> float:
        return max(self._free_at, self._clock.now)

    def seconds(self, earlier: float, later: float) -> float | None:
        return later - earlier if later <= self._clock.now else None


def test_of_a_device_its_own_time_counts_and_what_it_has_not_reached_counts_later(time: Clock) -> None:
    device = Device(time)
    with DeviceStopwatch(device) as watch:
        with timed("data"):
            time.sleep(0.1)  # the device has nothing to do
        with timed("forward"):
            device.order(1.0)
            time.sleep(0.01)  # of the host, to give the order
        with timed("backward"):
            device.order(2.0)
            with timed("communication"):
                device.order(0.5)
        time.sleep(3.5)  # as for the loss
        with timed("optimizer"):
            device.order(0.25)
        first = watch.take()
        assert first["data"] == pytest.approx(0.1)
        assert first["forward"] == pytest.approx(1.0)
        assert first["backward"] == pytest.approx(2.0)
        assert first["communication"] == pytest.approx(0.5)
        assert first["optimizer"] == 0.0
        time.sleep(1.0)
        second = watch.take()
        assert second["optimizer"] == pytest.approx(0.25)
        assert sum(first.values()) + sum(second.values()) == pytest.approx(time.now)


def test_the_backward_of_a_device_may_run_in_a_thread_that_python_has_not_started(time: Clock) -> None:
    def elsewhere(done: threading.Event) -> None:
        with timed("communication"):
            time.sleep(0.25)
        done.set()

    def run(start: Callable[..., object]) -> None:
        done = threading.Event()
        start(elsewhere, (done,))
        assert done.wait(10)

    def start_by_python(function: Callable[..., None], args: tuple[threading.Event]) -> None:
        threading.Thread(target=function, args=args).start()

    with DeviceStopwatch(Device(time)) as watch:
        with timed("backward"):
            time.sleep(0.5)
            run(_thread.start_new_thread)
            run(start_by_python)  # the loop's helpers wait for their own sake
        run(_thread.start_new_thread)
        taken = watch.take()
    assert (taken["backward"], taken["communication"], taken["other"]) == (0.75, 0.25, 0.25)


def heard_marks() -> tuple[list[str], Callable[[str], AbstractContextManager[None]]]:
    heard: list[str] = []

    @contextmanager
    def mark(phase: str) -> Iterator[None]:
        heard.append(phase)
        yield
        heard.append(f"end of {phase}")

    return heard, mark


def test_phases_that_begin_while_they_are_marked_are_entered_and_left_in_turn() -> None:
    heard, mark = heard_marks()

    with Stopwatch(), timed("forward"):
        with timed("data"):
            pass
        with marked(mark), timed("backward"), timed("communication"):
            pass
        with timed("transfer"):
            pass
    with marked(mark), timed("forward"):
        pass  # no stopwatch
    assert heard == ["backward", "communication", "end of communication", "end of backward"]


def test_a_phase_that_was_open_before_the_marks_or_outlives_them_is_left_alone() -> None:
    heard, mark = heard_marks()

    with Stopwatch() as watch:
        watch.open("forward")
        with marked(mark):
            watch.close()
            watch.open("backward")
        watch.close()
        assert heard == ["backward", "end of backward"]
        assert watch.phase == "other"
