from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_run import recipe, step

from trainfleet.doctor.finding import Finding
from trainfleet.doctor.run import learning
from trainfleet.doctor.run.summary import Kept, Summary
from trainfleet.events import AnomalySeen, Evaluated
from trainfleet.monitor.jsonl import _with_floats, to_json


def rows(*events) -> list[dict[str, Any]]:
    return [_with_floats(json.loads(to_json(event, written_at=0.0))) for event in events]


def run(change: Callable[[int], dict[str, Any]] = lambda number: {}, *, steps: int = 400, **known: Any) -> Summary:
    taken = rows(*(step(number, steps=steps, **change(number)) for number in range(1, steps + 1)))
    return Summary(folder=Path("runs/x"), **{"recipe": recipe(), "steps": taken, "warm": taken[1:], **known})


def only(rule, about: Summary) -> Finding:
    (found,) = rule(about)
    assert found.gain > 0
    return found.finding


@pytest.mark.parametrize("rule", learning.RULES)
@pytest.mark.parametrize("steps", [0, 5, 100, 400])
def test_a_healthy_run_gives_no_advice_however_short(rule, steps):
    assert list(rule(run(steps=steps))) == []


def test_a_loss_that_stays_nan_is_the_result_and_names_where_to_go_back_to():
    kept = [Kept(step=100), Kept(step=200), Kept(step=300), Kept(step=150, problem="torn")]
    seen = rows(AnomalySeen(step=250, kind="loss_not_finite", what="NaN", policy="warn", module="head.norm"))
    about = run(lambda n: {"loss": math.nan} if n >= 250 else {}, checkpoints=kept, anomalies=seen)
    found = only(learning.not_finite, about)
    assert found.verdict == "no" and found.fact == "the loss is not finite from step 250 on, first in head.norm"
    assert found.remedy.startswith("Go on from the checkpoint of step 200: train.rollback_every=100")
    assert "optimizer.lr=0.001 (a third)" in found.remedy


def test_a_nan_that_passed_is_a_note_and_those_that_were_skipped_are_none():
    found = only(learning.not_finite, run(lambda n: {"loss": math.inf} if n in (9, 10) else {}))
    assert found.verdict == "note" and "was not finite at step 9 and at 1 more" in found.fact
    found = only(learning.not_finite, run(lambda n: {"grad_norm": math.nan} if n == 9 else {}))
    assert "the gradient was not finite at step 9" in found.fact
    overflow = run(lambda n: {"grad_norm": math.inf, "skipped": True} if n == 9 else {})
    assert list(learning.not_finite(overflow)) == []


def test_a_validation_that_is_nan_is_told():
    found = only(learning.not_finite, run(evaluations=rows(Evaluated(step=100, loss=math.nan))))
    assert "the validation loss was not finite at step 100" in found.fact


def test_spikes_are_counted_with_what_would_have_held_them():
    jumps = run(lambda n: {"loss": 9.0} if n in (150, 250, 350) else {}, recipe=recipe(train={"clip_norm": None}))
    found = only(learning.spikes, jumps)
    assert found.fact == "the loss jumped at 3 of 400 steps (150, 250, 350), up to 9"
    assert found.remedy.startswith("train.clip_norm=2 (now None)") and "optimizer.lr=0.0015 (a half)" in found.remedy


def test_one_spike_is_no_news():
    assert list(learning.spikes(run(lambda n: {"loss": 9.0} if n == 200 else {}))) == []


def test_steps_that_fp16_skips_are_told_after_the_scale_has_settled():
    assert list(learning.skipped_steps(run(lambda n: {"skipped": n < 20}))) == []
    found = only(learning.skipped_steps, run(lambda n: {"skipped": n % 10 == 0}))
    assert "35 of the last 350 steps (10%)" in found.fact and "plan.precision=bf16" in found.remedy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda n: {"loss": 9.0} if 3 <= n < 15 else {}, "the loss rose from 5.524 to 9"),
        (lambda n: {"grad_norm": 60.0} if n < 15 else {}, "times as large as later (60)"),
    ],
)
def test_a_start_that_suffers_from_the_full_rate_is_told(change, said):
    cold = recipe(schedule={"warmup_steps": 0})
    found = only(learning.never_warmed, run(change, recipe=cold, planned=5000))
    assert said in found.fact and found.remedy == "schedule.warmup_steps=100 (now 0)"
    assert list(learning.never_warmed(run(change))) == [], "it has a warm-up"
    assert list(learning.never_warmed(run(recipe=cold))) == [], "it does no harm"


def test_a_loss_that_left_its_best_is_divergence_and_not_a_plateau():
    about = run(lambda n: {"loss": 2.0 + (n - 200) * 0.02} if n > 200 else {}, checkpoints=[Kept(step=200)])
    found = only(learning.diverges, about)
    assert "and is 5.81 now" in found.fact and found.remedy.startswith("Go on from the checkpoint of step 200 with")
    assert list(learning.plateau(about)) == []


def test_a_loss_that_stands_still_at_a_high_rate_is_told():
    constant = recipe(schedule={"name": "constant"})
    still = run(lambda n: {"learning_rate": 3e-3, "loss": max(2.0, 5.0 - n * 0.03)}, recipe=constant)
    found = only(learning.plateau, still)
    assert "the loss stands at 2 since step 2" in found.fact and found.remedy.startswith("schedule.name=cosine")
    assert list(learning.plateau(run(lambda n: {"loss": max(2.0, 5.0 - n * 0.03)}))) == [], (
        "the rate falls as it should"
    )


def test_overfitting_names_the_best_step_and_how_to_keep_it():
    losses = [3.0, 2.5, 2.2, 2.3, 2.5, 2.8, 3.0, 3.2]
    about = run(evaluations=rows(*(Evaluated(step=50 * n, loss=loss) for n, loss in enumerate(losses, 1))))
    found = only(learning.overfits, about)
    assert "validation was best at step 150 (2.2) and is 3.2 now" in found.fact
    assert found.remedy.startswith("train.early_stopping=3 checkpoint.keep_best=1")


def test_a_run_that_is_worse_in_training_too_is_not_overfitting():
    losses = [3.0, 2.5, 2.2, 2.3, 2.5, 2.8, 3.0, 3.2]
    evaluations = rows(*(Evaluated(step=50 * n, loss=loss) for n, loss in enumerate(losses, 1)))
    assert list(learning.overfits(run(lambda n: {"loss": 1.0 + n * 0.01}, evaluations=evaluations))) == []


def test_many_bad_samples_are_told():
    assert list(learning.skipped_samples(run(skipped_samples=9))) == []
    assert "1,000 samples could not be read" in only(learning.skipped_samples, run(skipped_samples=1000)).fact


def test_what_the_run_has_seen_itself_is_counted_once_a_kind():
    seen = [AnomalySeen(step=n, kind="dead_units", what=f"all of fc{n} are 0", policy="warn", path="x") for n in (1, 2)]
    found = only(learning.anomalies, run(anomalies=rows(*seen)))
    assert found.subject == "dead units" and found.fact == "2 times, last at step 2: all of fc2 are 0"
    assert found.remedy == "trainfleet replay runs/x --step 2"
