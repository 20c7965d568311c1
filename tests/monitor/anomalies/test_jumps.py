"""What jumps out of its history is told, and what only falls, warms up or is noisy is not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import pytest

from trainfleet.monitor.anomalies import Jump, Jumps
from trainfleet.monitor.anomalies.jumps import ENOUGH


def rises(value: float, usual: float, first: float) -> bool:
    return value - usual > max(0.25 * abs(usual), 0.05 * abs(first))


def told(values: Iterable[float]) -> list[int]:
    """At which values; such a one is not remembered."""
    jumps, found = Jumps(deviations=7.0, is_worth=rises), []
    for i, value in enumerate(values):
        if jumps.judge(value) is not None:
            found.append(i)
        else:
            jumps.accept(value)
    return found


def gauss(draw: random.Random, i: int) -> float:
    return draw.gauss(1, 0.05)


CALM: dict[str, Callable[[random.Random, int], float]] = {
    "falling fast": lambda draw, i: 10 * math.exp(-i / 40) + 0.5 + draw.gauss(0, 0.05),
    "a noisy start": lambda draw, i: 2 + draw.gauss(0, 2 if i < 40 else 0.1),
    "a warm-up that rises": lambda draw, i: 2.3 + 2 * min(1, i / 60) + draw.gauss(0, 0.05),
    "no noise, then some": lambda draw, i: 2.3 + (0 if i < 40 else draw.gauss(0, min(0.2, (i - 40) / 200))),
    "tiny batches": lambda draw, i: draw.expovariate(1) * (0.2 + math.exp(-i / 300)),
    "steps of a schedule": lambda draw, i: (2.0 if i < 200 else 1.5 if i < 300 else 1.2) + draw.gauss(0, 0.05),
    "waves": lambda draw, i: 2 + 0.5 * math.sin(i / 15) + draw.gauss(0, 0.05),
    "below zero": lambda draw, i: -3 - i / 100 + draw.gauss(0, 0.1),
    "nearly zero": lambda draw, i: 2 * math.exp(-i / 15) + math.exp(draw.gauss(-9, 1.5)),
}


@pytest.mark.parametrize("name", CALM)
def test_a_calm_history_tells_nothing(name: str) -> None:
    assert [told(CALM[name](random.Random(seed), i) for i in range(500)) for seed in range(20)] == [[]] * 20


@pytest.mark.parametrize("name", sorted(set(CALM) - {"tiny batches"}))
@pytest.mark.parametrize("at", [120, 350])
def test_a_spike_in_it_is_told(name: str, at: int) -> None:
    draw = random.Random(1)
    values = [CALM[name](draw, i) for i in range(400)]
    values[at] += 5
    assert told(values) == [at]


def test_a_spike_says_how_far_it_is_from_the_usual() -> None:
    jumps, draw = Jumps(deviations=7.0, is_worth=rises), random.Random(0)
    for i in range(200):
        jumps.accept(gauss(draw, i))
    found = jumps.judge(2.0)
    assert isinstance(found, Jump) and found.usual == pytest.approx(1, abs=0.05)
    assert found.deviations == pytest.approx(20, rel=0.4)


def test_nothing_is_judged_before_enough_is_known_and_after_it_was_forgotten() -> None:
    jumps = Jumps(deviations=7.0, is_worth=rises)
    for _ in range(ENOUGH - 1):
        jumps.accept(1.0)
    assert jumps.judge(99.0) is None
    jumps.accept(1.0)
    assert jumps.judge(99.0) == Jump(1.0, math.inf)
    jumps.forget()
    assert jumps.judge(99.0) is None
