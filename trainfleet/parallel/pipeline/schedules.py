"""Schedules: in which order each rank of a pipeline takes micro-batches forward and backward, and when it sends.

The orders are those of torch's schedules; gpipe (Huang et al., arXiv:1811.06965) and 1f1b (Narayanan et al.,
arXiv:2104.04473) are written out here. We run them ourselves, for torch's own stages know one chain of tensors and hide
what they do in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainfleet.errors import PlanError
from trainfleet.parallel.torch_private import torch_schedule
from trainfleet.plan import Plan

Kind = Literal["F", "B", "I", "W", "send F", "recv F", "send B", "recv B"]
"""Forward; backward; its part for the inputs, its part for the parameters; messages of both directions."""
V_SHAPED = ("zbv", "dualpipev")
SEVERAL = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", *V_SHAPED)
"""Schedules in which a rank holds several stages."""
SPLITS = ("interleaved_zero_bubble", *V_SHAPED)
"""Schedules that take the backward in two parts."""


@dataclass(frozen=True, slots=True)
class Action:
    kind: Kind
    stage: int
    micro_batch: int


def stages_per_rank(plan: Plan) -> int:
    """How many stages each rank holds; PlanError where the schedule wants another number."""
    wanted = plan.stages_per_rank or (2 if plan.schedule in SEVERAL else 1)
    if plan.schedule not in SEVERAL and wanted != 1:
        raise PlanError(
            f"plan.stages_per_rank is {wanted}, but in plan.schedule={plan.schedule!r} each rank holds 1 stage. "
            f"Leave it out, or use a schedule for several: {', '.join(SEVERAL)}."
        )
    if plan.schedule in V_SHAPED and wanted != 2:
        raise PlanError(
            f"plan.stages_per_rank is {wanted}, but plan.schedule={plan.schedule!r} goes down and up the ranks once, "
            "so each holds 2 stages. Leave stages_per_rank out."
        )
    if plan.schedule in SEVERAL and wanted < 2:
        raise PlanError(
            f"plan.stages_per_rank is {wanted}, but plan.schedule={plan.schedule!r} is made for 2 and more. "
            "Use 2, or plan.schedule='1f1b'."
        )
    return wanted


def rank_of_stage(stage: int, plan: Plan) -> int:
    """The rank of the axis pp that holds `stage`: in turn, or down and up again."""
    lap, place = divmod(stage, plan.pp)
    return plan.pp - 1 - place if plan.schedule in V_SHAPED and lap % 2 else place


def refuse_micro_batches(plan: Plan, count: int) -> None:
    """PlanError where the schedule cannot run with `count` micro-batches in a step."""
    stages = plan.pp * stages_per_rank(plan)
    remedy = "Change batch.accumulation or plan.microbatches: a step has accumulation x microbatches of them."
    if plan.schedule == "dualpipev" and count < stages:
        raise PlanError(
            f"A step has {count} micro-batches, but plan.schedule='dualpipev' needs at least one for each of its "
            f"{stages} stages. {remedy}"
        )
    rounds = max(1, count // plan.pp)
    if plan.schedule in ("interleaved_1f1b", "interleaved_zero_bubble") and count % rounds:
        raise PlanError(
            f"A step has {count} micro-batches, but plan.schedule={plan.schedule!r} takes them in {rounds} equal "
            f"rounds over {plan.pp} ranks, so their number must be below {2 * plan.pp} or a multiple of {rounds}. "
            f"{remedy}"
        )


def orders(plan: Plan, num_micro_batches: int) -> list[list[Action]]:
    """By rank of the axis pp, everything that it does in a step."""
    refuse_micro_batches(plan, num_micro_batches)
    if plan.schedule == "gpipe":
        computed = [_gpipe(rank, num_micro_batches) for rank in range(plan.pp)]
    elif plan.schedule == "1f1b":
        computed = [_1f1b(rank, plan.pp, num_micro_batches) for rank in range(plan.pp)]
    else:
        rows = torch_schedule(plan.schedule, plan.pp, stages_per_rank(plan), num_micro_batches)
        computed = [[Action(kind, stage, number) for kind, stage, number in row] for row in rows]  # type: ignore[arg-type]
    return with_messages(computed, [rank_of_stage(i, plan) for i in range(plan.pp * stages_per_rank(plan))])


def forward_orders(plan: Plan, num_micro_batches: int) -> list[list[Action]]:
    """The same for forwards alone: each micro-batch through all stages."""
    ranks = [rank_of_stage(i, plan) for i in range(plan.pp * stages_per_rank(plan))]
    computed: list[list[Action]] = [[] for _ in range(plan.pp)]
    for number in range(num_micro_batches):
        for stage, rank in enumerate(ranks):
            computed[rank].append(Action("F", stage, number))
    return with_messages(computed, ranks)


def _gpipe(stage: int, count: int) -> list[Action]:
    return [Action("F", stage, i) for i in range(count)] + [Action("B", stage, i) for i in range(count)]


def _1f1b(stage: int, num_stages: int, count: int) -> list[Action]:
    ahead = min(count, num_stages - stage)
    found = [Action("F", stage, i) for i in range(ahead)]
    for i in range(count):
        found.append(Action("B", stage, i))
        if i + ahead < count:
            found.append(Action("F", stage, i + ahead))
    return found


def with_messages(computed: Sequence[Sequence[Action]], ranks: Sequence[int]) -> list[list[Action]]:
    """The orders of all ranks with sends and receives between what they compute; `ranks` has the rank of each stage.

    All of it is one sequence in which a send and its receive stand together, seen by each rank: so it cannot lock, even
    where a send waits for its receive.
    """
    found: list[list[Action]] = [[] for _ in computed]
    done: set[Action] = set()
    arrived: set[Action] = set()
    at = [0] * len(computed)
    while any(at[rank] < len(row) for rank, row in enumerate(computed)):
        before = list(at)
        for rank, row in enumerate(computed):
            if at[rank] == len(row) or not _is_ready(row[at[rank]], ranks, done, arrived):
                continue
            action = row[at[rank]]
            at[rank] += 1
            found[rank].append(action)
            done.add(action)
            _tell(action, rank, ranks, found, arrived)
        assert at != before, "a schedule waits for itself"
    return found


def _is_ready(action: Action, ranks: Sequence[int], done: set[Action], arrived: set[Action]) -> bool:
    stage, number = action.stage, action.micro_batch
    if action.kind == "F":
        return stage == 0 or Action("F", stage, number) in arrived
    if action.kind == "W":
        return Action("I", stage, number) in done
    is_last = stage == len(ranks) - 1
    return Action("F", stage, number) in done and (is_last or Action("B", stage, number) in arrived)


def _tell(action: Action, rank: int, ranks: Sequence[int], found: list[list[Action]], arrived: set[Action]) -> None:
    """Send what `action` made to the stage that waits for it."""
    if action.kind == "W":
        return
    kind: Literal["F", "B"] = "F" if action.kind == "F" else "B"
    stage = action.stage + (1 if kind == "F" else -1)
    if not 0 <= stage < len(ranks):
        return
    if ranks[stage] != rank:
        found[rank].append(Action("send F" if kind == "F" else "send B", action.stage, action.micro_batch))
        found[ranks[stage]].append(Action("recv F" if kind == "F" else "recv B", stage, action.micro_batch))
    arrived.add(Action(kind, stage, action.micro_batch))
