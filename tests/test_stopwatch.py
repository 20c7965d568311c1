"""Phases are exclusive, add up to the whole, and cost nothing where nobody measures."""

from __future__ import annotations

import threading

import pytest

from trainfleet.stopwatch import PHASES, Stopwatch, timed


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
        assert sum(watch.take().values()) == pytest.approx(1.5 * len(PHASES))
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
