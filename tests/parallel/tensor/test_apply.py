"""Split layers compute what one process computes: losses, gradients, norms and parameters after each step."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from oracle import plain_trace, traces
from rank_pool import RankPools
from split_models import PARTS, adamw, build, loss, tokens

from trainfleet.mesh import Mesh
from trainfleet.plan import Plan
from trainfleet.training.verify import Case, Trace, compare, trace


def case_of(name: str, dropout: float = 0.0) -> Case:
    return Case(
        build=functools.partial(build, name, dropout),
        loss_fn=loss,
        micro_batch=tokens,
        optimizer=adamw,
        steps=3,
        accumulation=2,
        clip_norm=0.5,
    )


def hold(ranks: RankPools, size: int, case: Case, plans: Sequence[Plan]) -> None:
    found = ranks(size, traces, case, plans)[0]
    for plan, each in zip(plans, found, strict=True):
        verdict = compare(plain_trace(case, plan.data_ranks(size)), each, "fp32")
        assert verdict.holds, f"{plan}: {verdict}"


@pytest.mark.parametrize("name", PARTS)
def test_two_ranks_compute_what_one_process_computes(ranks: RankPools, name: str) -> None:
    hold(ranks, 2, case_of(name), [Plan(tp=2), Plan(tp=2, zero=2)])
