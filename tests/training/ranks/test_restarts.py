"""Ranks that failed start again at once where the run goes forward, later where it does not, and not for ever."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from trainfleet.errors import AnomalyStopped, FailedTwice
from trainfleet.training.ranks.failure import Failure, death_of
from trainfleet.training.ranks.restarts import NotAgain, Restarts

ERROR = Failure(rank=1, world_size=2, host="a", time=1.0, sentence="failed at x.py:3: no.", exit_code=5, step=7)


def test_a_run_that_takes_steps_goes_on_at_once() -> None:
    restarts = Restarts()
    assert [restarts.after(replace(ERROR, step=step), took_steps=True) for step in range(9)] == [0.0] * 9


def test_starts_without_a_step_come_ever_later_until_one_takes_a_step() -> None:
    restarts = Restarts()
    pauses = [restarts.after(None, took_steps=False) for _ in range(9)]
    assert pauses == [0, 1, 2, 4, 8, 16, 30, 30, 30]
    assert restarts.after(None, took_steps=True) == 0
    assert restarts.after(None, took_steps=False) == 0


def test_the_same_error_at_the_same_step_is_not_met_a_third_time() -> None:
    restarts = Restarts()
    restarts.after(replace(ERROR, sentence="failed: <object at 0x7f01>", rank=0, time=9.0), took_steps=True)
    with pytest.raises(NotAgain) as caught:
        restarts.after(replace(ERROR, sentence="failed: <object at 0x7f02>"), took_steps=True)
    error = caught.value.failure.error()
    assert isinstance(error, FailedTwice) and error.exit_code == 13
    assert "failed twice in the same way after step 7" in str(error) and "newest checkpoint" in (error.hint or "")


@pytest.mark.parametrize("other", [{"step": 8}, {"sentence": "failed at x.py:4: no."}])
def test_another_step_or_error_goes_on(other: dict[str, object]) -> None:
    restarts = Restarts()
    restarts.after(ERROR, took_steps=True)
    assert restarts.after(replace(ERROR, **other), took_steps=True) == 0  # type: ignore[arg-type]


def test_kills_from_outside_say_nothing_of_the_next_start_but_crashes_do() -> None:
    restarts = Restarts()
    for _ in range(3):
        restarts.after(death_of(0, 2, -signal.SIGKILL, stopped=False, step=4), took_steps=True)
    crash = death_of(0, 2, -signal.SIGSEGV, stopped=False, step=4)
    restarts.after(crash, took_steps=True)
    with pytest.raises(NotAgain):
        restarts.after(crash, took_steps=True)


def test_a_run_that_an_anomaly_stopped_is_not_started_again() -> None:
    with pytest.raises(NotAgain) as caught:
        Restarts().after(replace(ERROR, exit_code=AnomalyStopped.exit_code), took_steps=True)
    assert caught.value.failure.error().exit_code == 17
