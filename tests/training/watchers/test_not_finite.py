"""What is no number is seen, told once while it lasts, and explained."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")

from training.inspection.test_finding import FINDING

from trainfleet.monitor.anomalies import AnomalyConfig
from trainfleet.training.inspection import Finding
from trainfleet.training.watchers.not_finite import NotFinite
from trainfleet.training.watchers.watcher import Judgement, UnderWay

NAN = math.nan


def of(step: int, loss: float, norm: float = 1.0, scale: float | None = None) -> UnderWay:
    """The engine is of no interest."""
    return UnderWay(step=step, micro_batches=[], engine=None, loss=loss, grad_norm=norm, loss_scale=scale)  # type: ignore[arg-type]


def judged(losses: list[float], explain: Any = None, **policies: Any) -> list[Judgement | None]:
    watch = NotFinite(AnomalyConfig(**policies).resolved(rolls_back=True), explain)
    return [watch.judge(of(i + 1, loss)) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "said"),
    [
        (NAN, NAN, None, ("loss_not_finite", "The loss is nan")),
        (math.inf, 1.0, 8.0, ("loss_not_finite", "The loss is inf")),
        (1.0, math.inf, None, ("gradient_not_finite", "The norm of the gradient is inf")),
        (1.0, math.inf, 8.0, None),
        (1e9, 1.0, None, None),
    ],
)
def test_what_is_not_finite_is_seen(loss: float, norm: float, scale: float | None, said: Any) -> None:
    judgement = NotFinite(AnomalyConfig().resolved(rolls_back=False)).judge(of(1, loss, norm, scale))
    assert (judgement and (judgement.kind, judgement.what)) == said


def test_what_lasts_is_told_once_and_when_it_is_over() -> None:
    found = judged([1, NAN, NAN, NAN, 1, 1], loss_not_finite="warn")
    assert [each and each.is_news for each in found] == [None, True, False, False, True, None]
    assert found[4] is not None and found[4].is_over and "finite again, after 3 steps" in found[4].what


def test_each_rollback_is_told() -> None:
    assert [each and (each.policy, each.is_news) for each in judged([NAN, NAN])] == [("rollback", True)] * 2


def test_skips_that_do_not_help_end_in_a_stop() -> None:
    found = judged([1, *[NAN] * 4], loss_not_finite="skip", skips_in_a_row=3)
    assert [each and each.policy for each in found] == [None, "skip", "skip", "skip", "stop"]
    assert found[-1] is not None and found[-1].is_news and "after 3 skipped updates in a row" in found[-1].what
    now_and_then = judged([NAN, 1] * 5, loss_not_finite="skip", skips_in_a_row=3)
    assert [each and each.policy for each in now_and_then][::2] == ["skip"] * 5


def test_the_explanation_is_asked_for_once() -> None:
    asked: list[int] = []

    def explain(under_way: UnderWay) -> Finding:
        asked.append(under_way.step)
        return replace(FINDING, what="layers.1 made it")

    first, *_ = judged([NAN, NAN, NAN], explain, loss_not_finite="skip")
    assert first is not None and first.what == "The loss is nan: layers.1 made it" and asked == [1]
    assert (first.rank, first.module, first.samples) == (1, "blocks.2.up", (37,)) and first.path == FINDING.path


def test_a_kind_that_is_off_is_not_judged() -> None:
    assert judged([NAN], loss_not_finite=None) == [None]
