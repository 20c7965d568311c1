from __future__ import annotations

import math
from typing import Any

import pytest

from trainfleet.monitor.history.steps import Steps


def row(step: int, **fields: Any) -> dict[str, Any]:
    known = {"time": 100.0 + step, "loss": 1.0 / step, "learning_rate": 0.1, "grad_norm": 2.0, "samples": 4}
    return {
        "step": step,
        "tokens": 64,
        "seconds": 0.5,
        "data_seconds": 0.1,
        "memory_bytes": 10 * step,
        **known,
        **fields,
    }


def test_a_group_of_one_step_has_its_very_numbers() -> None:
    steps = Steps(3)
    for n in (1, 2, 3):
        steps.add(row(n, loss=0.1 * n, phases={"data": 0.1, "forward": 0.3}, between_seconds=0.2, mfu=0.4))
    assert [(g.step, g.loss, g.memory_bytes) for g in steps.groups] == [(1, 0.1, 10), (2, 0.2, 20), (3, 0.1 * 3, 30)]
    last = steps.groups[-1]
    assert (last.time, last.tokens_per_second, last.mfu, last.between_seconds) == (103.0, 128.0, 0.4, 0.2)
    assert last.phases == {"data": 0.1, "forward": 0.3} and steps.mfu == pytest.approx(0.4)


def test_many_steps_come_in_few_groups_of_means_sums_and_peaks() -> None:
    steps = Steps(1000, most=10)
    for n in range(1, 1001):
        steps.add(row(n, loss=float(n)))
    assert len(steps.groups) == 10 and steps.groups[-1].step == 1000
    first = steps.groups[0]
    assert (first.loss, first.least_loss, first.most_loss) == (pytest.approx(50.5), 1.0, 100.0)
    assert (first.tokens, first.memory_bytes, first.num_steps) == (6400, 1000, 100)


def test_what_is_not_finite_is_counted_and_not_averaged() -> None:
    steps = Steps(40, most=10)
    for n, loss in enumerate([math.nan, 1.0, math.inf, 3.0, None, "x"], 1):
        steps.add(row(n, loss=loss, grad_norm=None))
    assert steps.groups[0].loss == 2.0 and steps.not_finite == 4
    assert math.isnan(steps.groups[1].loss) and math.isnan(steps.groups[0].grad_norm)


def test_the_first_step_of_each_start_counts_only_while_it_is_alone() -> None:
    steps = Steps(4)
    steps.add(row(1, seconds=10.0))
    assert steps.tokens_per_second == 6.4 and steps.step_seconds == 10.0
    steps.add(row(2))
    steps.begin()
    steps.add(row(3, seconds=10.0))
    steps.add(row(4))
    assert (steps.tokens_per_second, steps.samples_per_second, steps.step_seconds) == (128.0, 8.0, 0.5)


def test_without_phases_a_step_is_computing_and_data() -> None:
    steps = Steps(1)
    steps.add(row(1))
    assert steps.groups[0].phases == pytest.approx({"data": 0.1, "computing": 0.4})
