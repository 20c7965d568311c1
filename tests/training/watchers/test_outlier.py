"""A loss and a norm that jump are judged; what stays high is the usual after a while."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("torch")

from trainfleet.monitor.anomalies import AnomalyConfig
from trainfleet.training.watchers.outlier import GradientExplosion, LossSpike
from trainfleet.training.watchers.watcher import Judgement, UnderWay


def judged(
    losses: Sequence[float], norms: Sequence[float] | None = None, policy: Any = "warn", **config: Any
) -> list[Judgement | None]:
    kind = LossSpike if norms is None else GradientExplosion
    watch = kind(AnomalyConfig(**config), policy)
    under_ways = [
        UnderWay(step=i + 1, micro_batches=[], engine=None, loss=loss, grad_norm=norm, loss_scale=None)  # type: ignore[arg-type]
        for i, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses)))
    ]
    return [watch.judge(each) for each in under_ways]


def noise(count: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(2, 0.1) for _ in range(count)]


def test_a_spike_is_told_once_and_when_it_is_over() -> None:
    found = judged([*noise(100), 4.0, 4.1, 3.9, *noise(20, 1)])
    news = [(i + 1, each) for i, each in enumerate(found) if each is not None and each.is_news]
    (at, spike), (over_at, over) = news
    assert (at, spike.kind, spike.policy) == (101, "loss_spike", "warn") and over_at == 104
    assert spike.what.startswith("The loss is 4.0000, where ") and "robust standard deviations above" in spike.what
    assert over.is_over and over.what == "The loss is as usual again, after 3 steps"


def test_a_loss_that_stays_high_is_the_usual_then() -> None:
    found = [each for each in judged([*noise(100), *[each + 3 for each in noise(200, 1)]]) if each and each.is_news]
    assert [each.is_over for each in found] == [False, True]
    assert found[1].what == "The loss is as high for 20 steps, which is the usual from now on"


def test_a_small_rise_of_a_calm_loss_is_no_spike() -> None:
    assert judged([*[2.0] * 100, 2.4, *[2.0] * 5]) == [None] * 106
    assert judged([*[10.0] * 30, *[0.01] * 100, 0.3]) == [None] * 131, "what was learned is not lost"


def test_skips_that_do_not_help_end_in_a_stop() -> None:
    found = judged([*noise(100), *[9.0] * 5], policy="skip", skips_in_a_row=3)[100:]
    assert [each and each.policy for each in found] == ["skip", "skip", "skip", "stop", "stop"]
    assert [each and each.is_news for each in found][:4] == [True, False, False, True]


def test_an_explosion_is_told_by_factors() -> None:
    draw = random.Random(0)
    norms = [math.exp(draw.gauss(0, 0.3)) for _ in range(200)]
    norms[150] *= 1000
    found = judged([1.0] * 200, norms)
    (at,) = [i for i, each in enumerate(found) if each is not None and not each.is_over]
    assert at == 150 and found[at].kind == "gradient_explosion" and "times the usual" in found[at].what  # type: ignore[union-attr]


def test_a_norm_that_falls_shakes_or_is_tiny_does_not_explode() -> None:
    draw = random.Random(0)
    shaky = [math.exp(draw.gauss(0, 1.2) - i / 100) for i in range(600)]
    assert [each for each in judged([1.0] * 600, shaky) if each] == []
    assert judged([1.0] * 201, [*[1.0] * 50, *[1e-6] * 150, 1e-3]) == [None] * 201
    assert judged([1.0] * 101, [*[0.0] * 100, math.inf]) == [None] * 101


def test_losses_of_single_samples_that_are_learned_are_no_spikes() -> None:
    draw = random.Random(0)
    learned = [math.exp(draw.gauss(-6, 3)) for _ in range(2000)]
    assert max(learned) > 20 and [each for each in judged([*[2.3] * 20, *learned]) if each] == []
    assert judged([*learned, 1e9])[-1] is not None, "which is beyond these, too"


def test_losses_below_zero_are_judged_all_the_same() -> None:
    found = judged([*[each - 6 for each in noise(100)], 0.5])
    assert [each and each.kind for each in found] == [*[None] * 100, "loss_spike"]
