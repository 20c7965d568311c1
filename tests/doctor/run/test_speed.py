from __future__ import annotations

from pathlib import Path

import pytest
from planted_run import HEALTHY, recipe, report, step

from trainfleet.doctor.finding import Finding
from trainfleet.doctor.run import speed
from trainfleet.doctor.run.summary import Summary
from trainfleet.events import CheckpointSaved, Evaluated
from trainfleet.monitor.jsonl import to_json


def rows(*events) -> list[dict]:
    import json

    return [json.loads(to_json(event, written_at=0.0)) for event in events]


def run(phases: dict[str, float] | None = None, **known) -> Summary:
    """Of 100 steps; `phases` are added to those of a healthy one."""
    steps = rows(*(step(number, phases={**HEALTHY, **(phases or {})}) for number in range(1, 101)))
    return Summary(
        folder=Path("runs/x"), **{"recipe": recipe(), "world_size": 2, "steps": steps, "warm": steps, **known}
    )


def only(rule, about: Summary) -> Finding:
    (found,) = rule(about)
    assert 0 < found.gain <= 1
    return found.finding


@pytest.mark.parametrize("rule", speed.RULES)
def test_a_healthy_run_gives_no_advice(rule):
    assert list(rule(run())) == []


@pytest.mark.parametrize(
    ("cause", "data", "said"),
    [
        ("transform", {"workers": 0}, "data.workers=2 (now 0)"),
        ("source", {"workers": 4}, "data.workers=8 (now 4)"),
        ("network", {"source": "remote"}, "data.on_device=pixels"),
        ("transform", {"source": "remote"}, "more feeders"),
    ],
)
def test_starvation_names_its_cause_and_the_setting(cause, data, said):
    about = run({"data": 0.3})
    for row in about.warm:
        row["waits"] = {cause: 0.3}
    found = only(speed.starved, Summary(folder=about.folder, recipe=recipe(data=data), warm=about.warm))
    assert said in found.remedy and "61% of the time" in found.fact and "0.3 of 0.492 s a step" in found.fact


@pytest.mark.parametrize(
    ("plan", "batch", "said"),
    [
        ({"zero": 3}, {"micro_batch": 8}, "plan.zero=2"),
        ({"zero": 2}, {}, "batch.micro_batch=8 batch.accumulation=1, if it fits"),
        ({"zero": 2}, {"micro_batch": 8}, "plan.zero=1"),
        ({"zero": 0}, {}, "batch.micro_batch=8, or batch.accumulation=4"),
        ({"zero": 0, "tp": 2}, {}, "plan.tp and plan.cp no larger"),
    ],
)
def test_communication_says_which_plan_exchanges_less(plan, batch, said):
    found = only(speed.communicates, run({"communication": 0.3}, recipe=recipe(plan=plan, batch=batch)))
    assert said in found.remedy and "waiting for other ranks" in found.fact


def test_waiting_for_a_slow_rank_is_not_communication():
    slow, waiting = {**HEALTHY, "forward": 0.36}, {**HEALTHY, "communication": 0.32}
    reports = rows(*(report(10 * n, waiting, slow, waiting) for n in range(1, 6)))
    about = run({"communication": 0.3}, reports=reports, world_size=3)
    assert list(speed.communicates(about)) == []
    found = only(speed.slow_rank, about)
    assert (
        found.fact.startswith("rank 1 on node-1 (cpu) works 2.7 times as long") and "forward (1.5 s more)" in found.fact
    )
    assert "trainfleet doctor" in found.remedy


def test_ranks_that_are_slow_in_turn_are_no_slow_rank():
    slow, waiting = {**HEALTHY, "forward": 0.36}, {**HEALTHY, "communication": 0.32}
    turns = [(slow, waiting), (waiting, slow)] * 3
    reports = rows(*(report(10 * n, *turn) for n, turn in enumerate(turns, 1)))
    assert list(speed.slow_rank(run(reports=reports))) == []


def test_evaluation_says_how_seldom_it_would_be_cheap():
    evaluations = rows(*(Evaluated(step=n, loss=1.0, seconds=10.0) for n in (50, 100)))
    found = only(speed.evaluates, run({"evaluation": 0.2}, evaluations=evaluations))
    assert "51% of the time is evaluation: 10 s each, 2 times" in found.fact
    assert "train.evaluate_every=1016 (now 100)" in found.remedy


def test_stalls_of_checkpoints_are_told():
    saves = rows(CheckpointSaved(step=100, path="x", seconds=2.0))
    found = only(speed.saves_stall, run({"checkpoint": 0.02}, saves=saves))
    assert "2 s each" in found.fact and "checkpoint.every=935 (now 100)" in found.remedy


def test_steps_that_are_mostly_overhead_are_told():
    tiny = {"forward": 0.001, "backward": 0.001, "communication": 0.0, "data": 0.0, "optimizer": 0.002, "other": 0.001}
    found = only(speed.tiny_steps, run(tiny))
    assert "5.0 ms, and 60%" in found.fact and found.remedy.startswith("batch.micro_batch=8 batch.accumulation=1")


def test_an_empty_gpu_gets_larger_micro_batches_and_no_recomputation():
    about = {"device": "cuda:0", "capacity_bytes": 80_000_000_000}
    unused = list(speed.pieces_too_small(run(**about, recipe=recipe(plan={"recompute": "blocks"}))))
    assert [each.finding.remedy.split(":")[0] for each in unused] == [
        "plan.recompute=none",
        "batch.micro_batch=8 batch.accumulation=1",
    ]
    assert list(speed.pieces_too_small(run(device="cuda:0", capacity_bytes=500_000_000))) == []


def test_a_low_use_of_gpus_names_what_to_try_in_order():
    about = run(device="cuda:0")
    for row in about.warm:
        row["mfu"] = 0.1
    found = only(speed.low_mfu, about)
    assert found.remedy.startswith("plan.precision=bf16, then plan.compile=true, then batch.micro_batch=8")
    assert list(speed.low_mfu(run())) == [], "not measured"


def test_steps_that_become_slower_are_told_with_the_phase():
    slower = [step(number, phases={**HEALTHY, "backward": 0.1 if number < 300 else 0.4}) for number in range(1, 501)]
    found = only(speed.slowed_down, run(warm=rows(*slower)))
    assert "0.194 s at first, 0.494 s now, most of it in backward" in found.fact


def test_observers_that_cost_are_told_with_the_interval():
    found = only(speed.observers_cost, run({"observers": 0.02}))
    assert "9% of the time" in found.fact and "monitor.log_interval=190 (now 10)" in found.remedy


def test_what_is_written_once_is_no_cost_of_observers():
    steps = [step(number, phases={**HEALTHY, "observers": 9.0 if number == 10 else 0.0}) for number in range(1, 201)]
    assert list(speed.observers_cost(run(warm=rows(*steps)))) == []


def test_batches_that_travel_long_are_told():
    found = only(speed.moves, run({"transfer": 0.1}))
    assert "bringing batches to the device" in found.fact and "data.on_device" in found.remedy
