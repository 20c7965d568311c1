"""Tests of the schedules: complete, in an order that can be run, refused where they do not fit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from trainfleet.errors import PlanError
from trainfleet.parallel.pipeline.schedules import (
    SEVERAL,
    Action,
    forward_orders,
    orders,
    rank_of_stage,
    stages_per_rank,
    with_messages,
)
from trainfleet.plan import Plan

ALL = ("gpipe", "1f1b", *SEVERAL)


def run(rows: list[list[Action]], ranks: list[int]) -> list[Action]:
    """What the ranks do, one after the other where a send waits for its receive; fails where they lock."""
    at, done = [0] * len(rows), []
    while any(at[rank] < len(row) for rank, row in enumerate(rows)):
        heads = {rank: row[at[rank]] for rank, row in enumerate(rows) if at[rank] < len(row)}
        for rank, action in heads.items():
            if len(action.kind) == 1:
                done.append(action)
                at[rank] += 1
                break
            if action.kind.startswith("send"):
                direction = action.kind[-1]
                stage = action.stage + (1 if direction == "F" else -1)
                wanted = Action(f"recv {direction}", stage, action.micro_batch)  # type: ignore[arg-type]
                if heads.get(ranks[stage]) == wanted:
                    at[rank] += 1
                    at[ranks[stage]] += 1
                    break
        else:
            raise AssertionError(f"locked at {heads}")
    return done


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("schedule", ALL)
def test_every_micro_batch_passes_every_stage_both_ways_and_no_rank_waits_for_ever(schedule: Any, pp: int) -> None:
    plan = Plan(pp=pp, schedule=schedule)
    count = 2 * pp
    stages = pp * stages_per_rank(plan)
    ranks = [rank_of_stage(stage, plan) for stage in range(stages)]
    done = run(orders(plan, count), ranks)
    kinds = Counter(action.kind for action in done)
    assert kinds["F"] == stages * count == kinds["B"] + kinds["I"]
    assert kinds["I"] == kinds["W"]
    place = {action: i for i, action in enumerate(done)}
    for action, i in place.items():
        if action.kind == "F" and action.stage:
            assert place[Action("F", action.stage - 1, action.micro_batch)] < i
        if action.kind in ("B", "I") and action.stage < stages - 1:
            behind = [place.get(Action(kind, action.stage + 1, action.micro_batch), -1) for kind in ("B", "I")]
            assert max(behind) < i


def test_1f1b_keeps_no_more_micro_batches_than_there_are_stages_left() -> None:
    for rank, row in enumerate(orders(Plan(pp=4, schedule="1f1b"), 16)):
        alive = most = 0
        for action in row:
            alive += {"F": 1, "B": -1}.get(action.kind, 0)
            most = max(most, alive)
        assert most == 4 - rank


def test_a_v_goes_down_the_ranks_and_up_again() -> None:
    plan = Plan(pp=3, schedule="zbv")
    assert [rank_of_stage(stage, plan) for stage in range(6)] == [0, 1, 2, 2, 1, 0]
    plan = Plan(pp=3, schedule="looped_bfs")
    assert [rank_of_stage(stage, plan) for stage in range(6)] == [0, 1, 2, 0, 1, 2]


def test_forwards_alone_take_one_micro_batch_after_the_other() -> None:
    plan = Plan(pp=2, schedule="zbv")
    done = run(forward_orders(plan, 3), [rank_of_stage(stage, plan) for stage in range(4)])
    assert {action.kind for action in done} == {"F"}
    assert len(done) == 12


def test_a_schedule_that_cannot_run_is_found_out() -> None:
    with pytest.raises(AssertionError, match="waits for itself"):
        with_messages([[Action("B", 0, 0)], [Action("F", 1, 0)]], [0, 1])


@pytest.mark.parametrize(
    ("settings", "count", "said"),
    [
        ({"schedule": "1f1b", "stages_per_rank": 2}, 4, "each rank holds 1 stage"),
        ({"schedule": "zbv", "stages_per_rank": 3}, 4, "each holds 2 stages"),
        ({"schedule": "looped_bfs", "stages_per_rank": 1}, 4, "made for 2 and more"),
        ({"schedule": "dualpipev"}, 3, "at least one for each of its 4 stages"),
        ({"schedule": "interleaved_1f1b"}, 5, "2 equal rounds"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(settings: Any, count: int, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        orders(Plan(pp=2, **settings), count)
