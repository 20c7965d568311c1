"""Plans run on real processes of this machine, and held against one process, many in one go."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from trainfleet import launch
from trainfleet.errors import DataError, PlanError, RankFailed
from trainfleet.parallel.choices import Kind, Ties
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case, comparable
from trainfleet.training.proof.reference import Reference
from trainfleet.training.proof.trace import trace_rank
from trainfleet.training.proof.verdict import Trace, Verdict


def held_against_one_process(case: Case, plans: Sequence[Plan], size: int) -> list[Verdict | str]:
    """For each plan, on `size` processes: the verdict, or the reason for which the plan was refused."""
    works = [work_of(case, plan, size) for plan in plans]
    return [
        each if isinstance(each, str) else reference.verdict(each)
        for (_, _, reference), each in zip(works, _run(works, size))
    ]


Work = tuple[Case, Plan, Reference]


def work_of(case: Case, plan: Plan, size: int) -> Work:
    """What ranks have to compute, and what one process does; that is computed once."""
    case, plan, _ = comparable(case, plan)
    alone = Plan(precision=plan.precision, loss_scale=plan.loss_scale, microbatches=plan.microbatches)
    return case, plan, _reference(case, alone, plan.data_ranks(size))


_reference = functools.cache(Reference.of)


def _run(works: Sequence[Work], size: int) -> list[list[Trace] | str]:
    """What each rank computes under each plan. Where ranks fail, the plans are run in halves to see which."""
    try:
        by_rank = launch(_run_rank, size, ([(case, plan, reference.ties) for case, plan, reference in works],))
    except RankFailed as failure:
        if len(works) == 1:
            return [f"FAILED: {failure}"]
        half = len(works) // 2
        return [*_run(works[:half], size), *_run(works[half:], size)]
    found: list[list[Trace] | str] = []
    for parts in zip(*by_rank, strict=True):
        reasons = [part for part in parts if isinstance(part, str)]
        found.append(reasons[0] if reasons else [part for part in parts if not isinstance(part, str)])
    return found


def _run_rank(works: Sequence[tuple[Case, Plan, Mapping[Kind, Ties]]]) -> list[Trace | str]:
    found: list[Trace | str] = []
    for case, plan, ties in works:
        try:
            found.append(trace_rank(case, plan, ties))
        except (PlanError, DataError) as refusal:
            found.append(f"refused: {refusal}")
    return found


def degrees(plan: Plan) -> int:
    """Processes of a plan whose degrees are all given."""
    return (plan.dp_replicate or 1) * (plan.dp_shard or 1) * plan.tp * plan.cp * plan.pp


def spread(**settings: object) -> Plan:
    """A plan with every degree given: data-parallel ones are 1 unless `dp_replicate` or `dp_shard` says otherwise."""
    plan = Plan(**settings)  # type: ignore[arg-type]
    return replace(plan, dp_replicate=plan.dp_replicate or 1, dp_shard=plan.dp_shard or 1)
