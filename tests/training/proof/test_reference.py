"""One process is the reference, and so is what rounding does to it."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from oracle import case_of_model  # noqa: E402
from rank_pool import RankPools  # noqa: E402

from trainfleet.plan import Plan  # noqa: E402
from trainfleet.training.proof.reference import Reference  # noqa: E402
from trainfleet.training.proof.trace import trace_rank  # noqa: E402


def reference(name: str, plan: Plan, ranks: int) -> Reference:
    return Reference.of(case_of_model(name), plan, ranks)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ranks_hold_and_one_alone_does_not(ranks: RankPools, precision: Any) -> None:
    plan = Plan(precision=precision)
    one = ranks(1, reference, "transformer", plan, 2)[0]
    assert len(one.rounded) == (1 if precision == "fp32" else 2) and one.slack == 1.0
    verdict = one.verdict(ranks(2, trace_rank, case_of_model("transformer"), plan, {}), ["said before"])
    assert verdict.holds and verdict.remarks[0] == "said before"
    assert not one.verdict(ranks(1, trace_rank, case_of_model("transformer"), plan, {})).holds


def test_batch_statistics_leave_more_to_rounding(ranks: RankPools) -> None:
    assert ranks(1, reference, "convolutional", Plan(), 1)[0].slack == 4.0
