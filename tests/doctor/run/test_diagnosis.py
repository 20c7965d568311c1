from __future__ import annotations

import re
from pathlib import Path

import pytest
from planted_run import ended, healthy_events, started, step, write_run

import trainfleet.doctor.run
from trainfleet.config import describe
from trainfleet.doctor.run.diagnosis import diagnose, examine_run
from trainfleet.doctor.run.summary import Summary, summarize
from trainfleet.training.recipe import Recipe

STARVED = {"data": 0.3, "forward": 0.06, "backward": 0.1}


def test_a_healthy_run_has_no_finding(tmp_path):
    folder = write_run(tmp_path / "run", [started(), *healthy_events(), ended()])
    assert diagnose(summarize(folder)) == []
    where, time = examine_run(folder)
    assert where.fact == "400 of 400 steps, finished; 2 ranks on cpu"
    assert re.fullmatch(r"0\.194 s a step, 21,113 tokens/s: 52% backward, 31% forward, .*", time.fact)


def test_what_gains_most_comes_first(tmp_path):
    phases = {**STARVED, "evaluation": 0.1}
    events = [started(), *healthy_events(lambda number: {"phases": phases}), step(401, loss=float("nan")), ended(401)]
    found = [each.finding.subject for each in diagnose(summarize(write_run(tmp_path / "run", events)))]
    assert found == ["not finite", "data", "evaluation"]


def test_a_run_that_has_only_begun_is_not_judged_by_its_speed(tmp_path):
    events = [started(), *(step(number, phases=STARVED) for number in range(1, 15)), ended(14, "stopped early")]
    assert diagnose(summarize(write_run(tmp_path / "run", events))) == []


def test_a_run_without_steps_says_so(tmp_path):
    (nothing,) = examine_run(write_run(tmp_path / "run", [started(), ended(0, "stopped early")]))
    assert nothing.verdict == "note" and "no step is noted of 400" in nothing.fact
    assert diagnose(Summary(folder=tmp_path)) == []


def test_every_setting_that_is_named_in_advice_is_one():
    known = {key.key for key in describe(Recipe)} | {"optimizer.args.weight_decay", "schedule.warmup_steps"}
    source = "".join(path.read_text() for path in Path(trainfleet.doctor.run.__path__[0]).glob("*.py"))
    sections = "batch|plan|data|train|optimizer|schedule|checkpoint|monitor"
    named = set(re.findall(rf"\b((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)(?==)", source))
    assert len(named) > 15 and named <= known, named - known


@pytest.mark.parametrize("torn", [False, True])
def test_a_run_that_was_killed_is_told_also_if_its_last_line_is_torn(tmp_path, torn):
    _where, _time, died, *_ = examine_run(write_run(tmp_path / "run", [started(), *healthy_events()], torn=torn))
    assert died.verdict == "no" and "ended without a word after step 400 of 400" in died.fact
