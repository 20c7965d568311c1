from __future__ import annotations

import math
from typing import Any

import pytest

from trainfleet.monitor.history.goodput import UNDONE, Goodput, Ledger
from trainfleet.monitor.history.steps import Steps
from trainfleet.monitor.limit import COMPUTING
from trainfleet.monitor.spent import OUTSIDE

PHASES = {"data": 0.1, "forward": 0.2, "backward": 0.4, "communication": 0.1, "optimizer": 0.1, "evaluation": 0.1}


def step(number: int, time: float, **fields: Any) -> dict[str, Any]:
    return {"event": "StepEnded", "time": time, "step": number, "seconds": 1.0, "data_seconds": 0.25, **fields}


def started(time: float, at: int = 0) -> dict[str, Any]:
    return {"event": "RunStarted", "time": time, "start_step": at}


class Told:
    """A ledger beside the steps that stand, as `read_run` has them."""

    def __init__(self, *rows: Any) -> None:
        self._ledger, self._steps = Ledger(), Steps(len(rows))
        for row in rows:
            row, stands = row if isinstance(row, tuple) else (row, True)
            self._ledger.add(row, stands)
            if stands and row["event"] == "StepEnded":
                self._steps.add(row)

    def goodput(self, now: float | None = None) -> Goodput:
        return self._ledger.goodput(self._steps.phases, now)


def test_all_but_the_four_phases_of_steps_that_stand_is_below_the_line_only() -> None:
    rows = [
        started(100.0),
        *[step(n, 100.0 + n, phases=PHASES) for n in (1, 2, 3)],
        (step(4, 104.0, phases=PHASES), False),  # killed, and taken again below
        started(112.0, at=3),
        step(4, 115.0, phases=PHASES),
    ]
    goodput = Told(*rows).goodput()
    assert goodput.seconds == 15.0
    assert goodput.share == pytest.approx(4 * 0.8 / 15.0)
    assert goodput.parts[UNDONE] == pytest.approx(1.0) and goodput.parts["data"] == pytest.approx(0.4)
    assert goodput.parts[OUTSIDE] == pytest.approx(10.0)
    assert sum(goodput.parts.values()) == pytest.approx(goodput.seconds)


def test_a_file_without_phases_counts_a_step_but_for_its_waiting() -> None:
    evaluated = {"event": "Evaluated", "time": 102.5, "step": 2, "seconds": 0.5}
    goodput = Told(started(100.0), step(1, 101.0), step(2, 102.0), evaluated, step(3, 103.5)).goodput()
    assert goodput.parts == pytest.approx({COMPUTING: 2.25, "data": 0.75, "evaluation": 0.5, OUTSIDE: 0.0})
    assert goodput.share == pytest.approx(2.25 / 3.5)


def test_an_evaluation_counts_once_by_the_next_step_or_by_itself() -> None:
    def evaluated(n: int) -> dict[str, Any]:
        return {"event": "Evaluated", "time": 101.0 + n, "step": n, "seconds": 0.1}

    rows = [started(100.0), step(1, 101.0, phases={"forward": 1.0}), evaluated(1), step(2, 102.0, phases=PHASES)]
    assert Told(*rows).goodput().parts["evaluation"] == pytest.approx(0.1)
    assert Told(*rows, evaluated(2)).goodput().parts["evaluation"] == pytest.approx(0.2)
    saved = {"event": "CheckpointSaved", "time": 104.0, "step": 2, "seconds": 0.3}
    assert Told(*rows, evaluated(2), saved).goodput().parts["checkpoint"] == pytest.approx(0.3)
    early = {**saved, "step": 1}  # told late; it blocked before the second step
    assert "checkpoint" not in Told(*rows, early).goodput().parts


def test_a_stall_lowers_it_while_it_lasts() -> None:
    ledger = Told(started(100.0), step(1, 101.0, phases={"forward": 1.0}))
    assert [ledger.goodput(now).share for now in (None, 101.0, 110.0, 90.0)] == [1.0, 1.0, 0.1, 1.0]


def test_nothing_yet_and_numbers_that_are_none_do_no_harm() -> None:
    assert math.isnan(Told().goodput().share)
    assert math.isnan(Told(started(5.0)).goodput().share)
    odd = step(1, 4.0, seconds=math.nan, data_seconds="?", phases={"forward": math.inf, "data": -1.0})
    assert Told(started(5.0), odd).goodput().seconds == 0.0


def test_a_clock_that_was_set_back_gives_no_share_above_one() -> None:
    goodput = Told(started(500.0), step(1, 100.0, phases={"forward": 2.0})).goodput()
    assert goodput.share == 1.0 and goodput.parts[OUTSIDE] == 0.0
