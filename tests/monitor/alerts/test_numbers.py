from __future__ import annotations

import math
from typing import Any

import pytest

from trainfleet.events import Evaluated, RanksReported, Tracked
from trainfleet.monitor.alerts.numbers import OF_STEPS, Row, names_in, number_in

RANKS = [{"host": "a", "system": {"cpu_percent": 20.0}}, {"host": "b", "system": {"cpu_percent": 90.0}}, {"host": "c"}]


def found(event: Any, name: str, *, wants_largest: bool = True) -> float | None:
    return number_in(event, name, wants_largest=wants_largest)


@pytest.mark.parametrize(
    ("name", "number"),
    [("loss", 2.0), ("skipped", 0.0), ("mfu", None), ("tokens_per_second", 10240.0), ("samples_per_second", 80.0),
     ("phases.data", 0.25), ("phases.dat", None), ("waits.source", None), ("los", None), ("phases", None)],
)  # fmt: skip
def test_a_step_has_its_fields_its_rates_and_its_phases(story: Any, name: str, number: float | None) -> None:
    assert found(story.step(1, loss=2.0, phases={"data": 0.25}), name) == number


def test_a_step_that_took_no_time_has_no_rate(story: Any) -> None:
    assert found(story.step(1, seconds=0.0), "tokens_per_second") is None


def test_an_evaluation_has_its_loss_and_its_metrics() -> None:
    event = Evaluated(step=1, loss=3.0, metrics={"accuracy": 0.5})
    assert (found(event, "validation_loss"), found(event, "validation_accuracy")) == (3.0, 0.5)
    assert found(event, "loss") is None and found(event, "validation_x") is None


@pytest.mark.parametrize(("value", "number"), [(2, 2.0), ("2.5", 2.5), ("much", None), (None, None), ([1, 2], None)])
def test_a_tracked_value_that_is_no_number_is_none(value: Any, number: float | None) -> None:
    assert found(Tracked(step=1, name="mine", value=value), "mine") == number


def test_a_tracked_number_does_not_pass_for_one_of_the_step() -> None:
    assert found(Tracked(step=1, name="loss", value=9.0), "loss") is None


def test_of_several_ranks_the_one_that_crosses_first_counts() -> None:
    event = RanksReported(step=1, steps=1, ranks=RANKS)
    assert found(event, "system.cpu_percent") == 90.0
    assert found(event, "system.cpu_percent", wants_largest=False) == 20.0
    assert found(event, "system.gpu") is None
    lost = RanksReported(step=1, steps=1, ranks=[*RANKS, {"system": {"cpu_percent": math.nan}}])
    assert math.isnan(found(lost, "system.cpu_percent") or 0.0)


def test_a_row_has_the_newest_of_all(story: Any) -> None:
    row = Row()
    for event in (
        story.step(1, loss=2.0),
        Tracked(step=1, name="mine", value=7),
        Tracked(step=1, name="loss", value=9),
        Evaluated(step=1, loss=3.0),
        RanksReported(step=1, steps=1, ranks=RANKS),
        story.step(2, loss=1.0, phases={"data": 0.5}),
    ):
        row.update(event)
    known = {"step": 2, "loss": 1.0, "mine": 7, "validation_loss": 3.0, "ranks": RANKS, "tokens_per_second": 10240.0}
    assert known.items() <= row.values.items() and row.values["phases"] == {"data": 0.5}


def test_every_name_that_is_told_of_has_a_number(story: Any) -> None:
    others = [Evaluated(step=1, loss=1.0), Tracked(step=1, name="a", value=1.0)]
    for event in (story.step(1, phases={"data": 0.1}), *others, RanksReported(step=1, steps=1, ranks=RANKS)):
        names = set(names_in(event))
        assert names and all(found(event, name) is not None for name in names - {"mfu", "ready", "loss_scale"})
    assert set(OF_STEPS) <= set(names_in(story.step(1)))
