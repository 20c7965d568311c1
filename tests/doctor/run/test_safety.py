from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_run import BEGAN, ended, recipe, step

from trainfleet.doctor.finding import Finding
from trainfleet.doctor.run import safety
from trainfleet.doctor.run.safety import best_interval, interval_seconds
from trainfleet.doctor.run.summary import Kept, Summary
from trainfleet.events import CheckpointFailed, CheckpointSaved
from trainfleet.monitor.jsonl import to_json

GB = 10**9
WHOLE = [Kept(step=100, num_bytes=GB), Kept(step=200, num_bytes=GB)]


def rows(*events) -> list[dict[str, Any]]:
    return [json.loads(to_json(event, written_at=0.0)) for event in events]


def run(change: Callable[[int], dict[str, Any]] = lambda number: {}, *, steps: int = 240, **known: Any) -> Summary:
    taken = rows(*(step(number, **change(number)) for number in range(1, steps + 1)))
    usual: dict[str, Any] = {
        "recipe": recipe(),
        "planned": 240,
        "steps": taken,
        "warm": taken[1:],
        "saves": rows(*(CheckpointSaved(step=n, path="x", seconds=0.01) for n in (100, 200))),
        "checkpoints": WHOLE,
        "ended": rows(ended(240))[0],
        "heard_at": BEGAN,
        "free_bytes": 100 * GB,
        "capacity_bytes": 8 * GB,
    }
    return Summary(folder=Path("runs/x"), **{**usual, **known})


def only(rule, about: Summary) -> Finding:
    (found,) = rule(about)
    assert found.gain > 0
    return found.finding


@pytest.mark.parametrize("rule", safety.RULES)
def test_a_healthy_run_gives_no_advice(rule):
    assert list(rule(run())) == []
    assert list(rule(run(ended=None, is_alive=True))) == []


def test_a_death_without_a_word_tells_when_and_from_where_it_goes_on():
    found = only(safety.died, run(ended=None, failure=""))
    assert found.verdict == "no" and found.fact.startswith("it ended without a word after step 240 of 240, at 2026-11-")
    assert "dmesg" in found.remedy and "newest checkpoint (step 200; 40 steps are taken again)" in found.remedy
    report = "2026-11-22 01:00:00\nRank 1 of 2 on node-1 was killed by SIGKILL.\nMend it.\nTraceback"
    found = only(safety.died, run(ended=None, failure=report, checkpoints=[]))
    assert "failure.txt says: Rank 1 of 2 on node-1 was killed by SIGKILL. " in found.remedy
    assert "there is none, so from the beginning" in found.remedy


def test_an_error_is_told_in_its_own_words_and_an_interruption_is_a_note():
    found = only(safety.died, run(ended=rows(ended(240, "The disk is full."))[0]))
    assert found.verdict == "no" and found.fact.endswith("of 240: The disk is full")
    found = only(safety.died, run(ended=rows(ended(240, "interrupted"))[0], planned=400))
    assert found.verdict == "note" and "interrupted after step 240 of 400" in found.fact


def test_lost_steps_are_counted_and_saves_come_oftener():
    undone = rows(*(step(number, seconds=1.0) for number in range(200, 230)))
    found = only(safety.restarts, run(undone=undone, starts=3))
    assert found.fact.startswith("30 steps (39% of the work) were lost in 2 restarts")
    assert "checkpoint.every=52 (now 100)" in found.remedy


def test_the_interval_is_that_of_daly():
    """The oracle is his model of the time that a run takes, whose least is looked for second by second."""
    for save, between in ((1.0, 86_400.0), (300.0, 21_600.0), (60.0, 600.0)):
        cost = {seconds: math.expm1((seconds + save) / between) / seconds for seconds in range(1, 10_000)}
        assert interval_seconds(save, between) == pytest.approx(min(cost, key=cost.__getitem__), rel=0.01)
    assert interval_seconds(100.0, 40.0) == 40.0, "a save costs more than a failure leaves"


def test_saves_that_are_too_rare_or_too_often_get_the_best_interval():
    slow = {"seconds": 10.0, "phases": {"backward": 10.0}}
    rare = run(lambda n: slow, recipe=recipe(checkpoint={"every": 5000}), planned=20_000)
    found = only(safety.saves_too_rare_or_often, rare)
    assert "a failure loses 6:56:40 of work on average" in found.fact
    assert found.remedy.startswith("checkpoint.every=10 (now 5000): least loss at a failure each 1 d 00:00")
    often = run(recipe=recipe(checkpoint={"every": 5}))
    found = only(safety.saves_too_rare_or_often, often)
    assert (
        "block the loop for 1.0% of the time" in found.fact
        and f"checkpoint.every={best_interval(often)}" in found.remedy
    )
    assert list(safety.saves_too_rare_or_often(run(recipe=recipe(checkpoint={"every": 5000})))) == [], "a minute's run"


def test_a_run_without_checkpoints_is_told_once_it_has_something_to_lose():
    none = {"recipe": recipe(checkpoint={"every": None}), "saves": [], "checkpoints": []}
    assert list(safety.no_checkpoints(run(**none))) == []
    found = only(safety.no_checkpoints, run(lambda n: {"seconds": 6.0}, **none))
    assert "24:00 of work would be lost" in found.fact and found.remedy == "checkpoint.every=100: every ten minutes"


def test_checkpoints_that_failed_vanished_or_are_damaged_are_told():
    failed = rows(CheckpointFailed(step=220, reason="No space left on device."))
    found = only(safety.no_checkpoints, run(failed_saves=failed))
    assert found.verdict == "no" and "step 220 could not be saved: No space left" in found.fact
    found = only(safety.no_checkpoints, run(checkpoints=[Kept(step=200, problem="shard: missing")]))
    assert found.verdict == "no" and "none of them is there and whole now: shard: missing" in found.fact
    found = only(safety.no_checkpoints, run(checkpoints=[*WHOLE, Kept(step=240, problem="no manifest")]))
    assert found.verdict == "note" and "The newest whole one is of step 200" in found.remedy
    assert list(safety.no_checkpoints(run(failed_saves=rows(CheckpointFailed(step=150, reason="x"))))) == [], (
        "made good"
    )


def test_a_disk_without_room_for_two_more_is_told():
    found = only(safety.disk_fills, run(free_bytes=GB, ended=None))
    assert "1.00 GB are free, and a checkpoint is 1.00 GB" in found.fact and "checkpoint.keep_last=2" in found.remedy


def test_memory_that_is_nearly_full_says_what_to_turn_in_order():
    found = only(safety.memory_nearly_full, run(lambda n: {"memory_bytes": 79 * GB // 10}, world_size=2))
    assert found.fact == "a rank took 7.90 GB of the 8.00 GB that it has"
    assert found.remedy.split("; then ")[1:] == ["plan.recompute=blocks", "plan.zero=3"]
    assert found.remedy.startswith("batch.micro_batch=2 batch.accumulation=")


def test_memory_that_grows_says_when_it_is_full():
    leak = run(lambda n: {"memory_bytes": 10**8 + n * 10**7}, planned=10_000)
    found = only(safety.memory_grows, leak)
    assert "10 MB a step" in found.fact and "it is full at step 8" in found.fact and ".item()" in found.remedy
    cache = run(lambda n: {"memory_bytes": 10**8 + min(n, 60) * 10**7})
    assert list(safety.memory_grows(cache)) == [], "a cache that has filled"
