"""Models of Hugging Face's families compute under every stage of ZeRO what one process computes."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="Hugging Face's models are not installed: pip install 'trainfleet[hf]'")

from proof.families import FAMILIES
from proof.families import case_of as proven
from rank_pool import RankPools

from trainfleet.mesh import Mesh
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case
from trainfleet.training.proof.reference import Reference
from trainfleet.training.proof.trace import trace
from trainfleet.training.proof.verdict import Trace

PLANS = [
    Plan(zero=3),
    Plan(zero=3, precision="bf16", recompute="blocks"),
    Plan(zero=2, recompute="selective"),
    Plan(zero=1, precision="fp16"),
    Plan(tp=2),
    Plan(tp=2, precision="bf16", recompute="blocks"),
]


def case_of(family: str) -> Case:
    return replace(proven(family), keep_activations=False)  # those of rank 0 alone


def on_ranks(family: str, plan: Plan) -> Trace:
    with Mesh.from_env(plan) as mesh:
        return trace(case_of(family), plan, mesh)


def on_one(family: str, plan: Plan, ranks: int) -> Reference:
    return Reference.of(case_of(family), plan, ranks)


def holds(ranks: RankPools, family: str, plan: Plan) -> None:
    reference = ranks(1, on_one, family, plan, plan.data_ranks(2))[0]
    verdict = reference.verdict(ranks(2, on_ranks, family, plan))
    assert verdict.holds, str(verdict)


@pytest.mark.parametrize(("family", "plan"), [("bert", PLANS[0]), ("llama", PLANS[1]), ("gpt2", PLANS[4])], ids=str)
def test_a_family_computes_the_same(family: str, plan: Plan, ranks: RankPools) -> None:
    holds(ranks, family, plan)


@pytest.mark.matrix
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_under_every_plan(family: str, plan: Plan, ranks: RankPools) -> None:
    holds(ranks, family, plan)
