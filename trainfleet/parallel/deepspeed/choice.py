"""Whether DeepSpeed runs a plan that names it: where it is not installed, our own engine does, with a warning."""

from __future__ import annotations

import logging
from dataclasses import replace

from trainfleet.comm.group import Group
from trainfleet.deps import installed
from trainfleet.errors import DependencyError, PlanError
from trainfleet.parallel.deepspeed.config import plan_with_file
from trainfleet.plan import Plan

logger = logging.getLogger(__name__)

EXTRA = 'pip install "trainfleet[deepspeed]"'


def refuse_missing(plan: Plan) -> None:
    """DependencyError where the plan insists on an engine that is not installed here. For before the start."""
    if plan.engine == "deepspeed" and plan.engine_required and installed("deepspeed") is None:
        raise DependencyError(
            f"plan.engine is 'deepspeed' with plan.engine_required, and DeepSpeed is not installed: {EXTRA}.",
            hint="Or leave engine_required out, and our own engine takes its place.",
        )


def at_hand(plan: Plan, group: Group) -> Plan:
    """The plan for the engine that all ranks of `group` have; a collective where it names DeepSpeed.

    PlanError where its DeepSpeed file says what the plan does not: the mesh was made without it.
    """
    if plan.engine != "deepspeed":
        return plan
    refuse_missing(plan)
    if plan_with_file(plan) != plan:
        raise PlanError(
            f"{plan.deepspeed_config} says what the plan leaves out. Take it over before the mesh is made: "
            "plan = plan_with_file(plan), from trainfleet.parallel.deepspeed.config."
        )
    there = group.exchange(installed("deepspeed"))
    if all(version is not None for version in there):
        return plan
    if plan.engine_required:
        raise DependencyError(f"DeepSpeed is not installed where rank {there.index(None)} runs: {EXTRA}.")
    if group.rank == 0:
        logger.warning(
            "plan.engine is 'deepspeed', which is not installed (%s), so our own engine runs the plan: the same stage, "
            "with the same numbers. What %s says further is not used.",
            EXTRA,
            plan.deepspeed_config or "a DeepSpeed file",
        )
    return replace(plan, engine="native", engine_required=False, deepspeed_config=None)
