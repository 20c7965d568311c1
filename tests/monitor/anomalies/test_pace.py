"""Steps that have become slow are told once that lasts, and what lies between steps is not looked at."""

from __future__ import annotations

import random
from collections.abc import Iterable

from trainfleet.events import StepEnded
from trainfleet.monitor.anomalies import Finding, Pace


def step(number: int, seconds: float, tokens: int = 100, between: float = 0.0) -> StepEnded:
    return StepEnded(
        step=number,
        loss=1.0,
        learning_rate=0.1,
        grad_norm=1.0,
        samples=1,
        tokens=tokens,
        seconds=seconds,
        data_seconds=0.0,
        between_seconds=between,
    )


def found(steps: Iterable[StepEnded], lasting: float = 30.0) -> list[tuple[int, Finding]]:
    pace = Pace(factor=2.0, lasting_seconds=lasting)
    return [(each.step, finding) for each in steps if (finding := pace.end(each)) is not None]


def test_a_drop_is_told_once_and_so_is_its_end() -> None:
    seconds = [9.0] + [0.5] * 99 + [1.5] * 100 + [0.5] * 100
    (at, drop), (over_at, over) = found(step(i + 1, each) for i, each in enumerate(seconds))
    assert 120 <= at <= 140 and drop.what == "The throughput is 66.6667 tokens/s, 33% of the usual 200, for 30 s"
    assert over.is_over and over_at == 220 and "200 tokens/s again, after 100 steps" in over.what


def test_noise_a_few_slow_steps_and_a_short_drop_are_no_drop() -> None:
    draw = random.Random(0)
    noisy = [step(i, 0.5 * draw.lognormvariate(0, 0.4)) for i in range(1, 500)]
    assert found(noisy) == []
    assert found(step(i, 30.0 if i % 5 == 0 else 0.5) for i in range(1, 200)) == []
    assert found(step(i, 1.5 if 100 < i <= 116 else 0.5) for i in range(1, 300)) == []
    assert found(step(i, 0.05 if i < 200 else 0.2) for i in range(1, 300)) == [], "20 s of it"


def test_longer_batches_and_what_lies_between_steps_are_no_drop() -> None:
    assert found(step(i, 0.5 * (1 + i % 4), tokens=100 * (1 + i % 4)) for i in range(1, 400)) == []
    assert found(step(i, 0.5, between=100.0 if i > 200 else 0.0) for i in range(1, 400)) == []
    assert found(step(i, 0.5 if i < 200 else 5.0, tokens=100 if i < 200 else 1000) for i in range(1, 400)) == []


def test_what_was_slow_from_the_beginning_is_usual() -> None:
    assert found((step(i, 20.0 if i <= 20 else 2.0) for i in range(1, 200)), lasting=0.0) == []
