"""Plans run on real processes of this machine, and held against one process, many in one go."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from trainfleet import launch
from trainfleet.errors import DataError, PlanError, RankFailed
from trainfleet.mesh import Mesh
from trainfleet.plan import Plan
from trainfleet.training.verdict import CONCATENATED_SLACK, Trace, Verdict, compare, joined
from trainfleet.training.verify import Case, otherwise_rounded, reference_case, trace, trace_rank


def held_against_one_process(case: Case, plans: Sequence[Plan], size: int) -> list[Verdict | str]:
    """For each plan, on `size` processes: the verdict, or the reason for which the plan was refused."""
    found = run(case, plans, size)
    return [each if isinstance(each, str) else verdict_of(case, plan, size, each) for plan, each in zip(plans, found)]


def run(case: Case, plans: Sequence[Plan], size: int) -> list[Trace | str]:
    """What each plan computes, or why it was refused. Where ranks fail, the plans are run in halves to see which."""
    try:
        by_rank = launch(_run, size, (case, plans))
    except RankFailed as failure:
        if len(plans) == 1:
            return [f"FAILED: {failure}"]
        half = len(plans) // 2
        return [*run(case, plans[:half], size), *run(case, plans[half:], size)]
    together: list[Trace | str] = []
    for parts in zip(*by_rank, strict=True):
        reasons = [part for part in parts if isinstance(part, str)]
        together.append(reasons[0] if reasons else joined([part for part in parts if not isinstance(part, str)]))
    return together


def _run(case: Case, plans: Sequence[Plan]) -> list[Trace | str]:
    found: list[Trace | str] = []
    together = reference_case(case, 1)[0]  # what cannot be compared is switched off here too
    comparable = replace(case, build=together.build, keep_activations=together.keep_activations)
    for plan in plans:
        try:
            found.append(trace_rank(comparable, plan))
        except (PlanError, DataError) as refusal:
            found.append(f"refused: {refusal}")
    return found


def verdict_of(case: Case, plan: Plan, size: int, found: Trace) -> Verdict:
    alone = Plan(precision=plan.precision, microbatches=plan.microbatches)
    reference, *rounded = references(case, plan.data_ranks(size), alone)
    remarks = reference_case(case, plan.data_ranks(size))[1]
    slack = CONCATENATED_SLACK[plan.precision] if remarks else 1.0
    return compare(reference, found, plan.precision, slack=slack, rounded=rounded)


@functools.cache
def references(case: Case, ranks: int, alone: Plan) -> list[Trace]:
    """What one process computes on the micro-batches of so many ranks; first as it is, then rounded in other ways."""
    together = reference_case(case, ranks)[0]
    with Mesh.from_env(alone) as mesh:
        first = trace(together, alone, mesh)
        return [first, *(trace(each, plan, mesh) for each, plan in otherwise_rounded(together, alone))]


def degrees(plan: Plan) -> int:
    """Processes of a plan whose degrees are all given."""
    return (plan.dp_replicate or 1) * (plan.dp_shard or 1) * plan.tp * plan.cp * plan.pp


def spread(**settings: object) -> Plan:
    """A plan with every degree given: data-parallel ones are 1 unless `dp_replicate` or `dp_shard` says otherwise."""
    plan = Plan(**settings)  # type: ignore[arg-type]
    return replace(plan, dp_replicate=plan.dp_replicate or 1, dp_shard=plan.dp_shard or 1)
