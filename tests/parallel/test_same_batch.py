"""Ranks of one tp or cp group that get different micro-batches are stopped in their first step, with the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_pool import RankPools
from split_models import adamw, build, loss, tokens

from trainfleet.errors import DataError
from trainfleet.mesh import Mesh
from trainfleet.parallel import make_engine, parallelize
from trainfleet.parallel.same_batch import refuse_unlike_batches
from trainfleet.plan import Plan


def first_step(plan: Plan, by: str) -> str:
    with Mesh.from_env(plan) as mesh:
        torch.manual_seed(0)
        model = parallelize(build("fused"), mesh, plan)
        engine = make_engine(model, adamw(model), loss)
        dealt = mesh.world if by == "world" else mesh.data_axes
        try:
            engine.forward_backward([tokens(dealt.rank + i * dealt.size) for i in range(2)])
        except DataError as exc:
            return f"{exc} {exc.hint}"
    return ""


@pytest.mark.parametrize("plan", [Plan(cp=2), Plan(tp=2)], ids=str)
def test_batches_dealt_over_all_ranks_are_refused_and_those_over_data_ranks_taken(ranks: RankPools, plan: Plan) -> None:
    assert ranks(2, first_step, plan, "data") == ["", ""]
    for said in ranks(2, first_step, plan, "world"):
        assert "Ranks 0 and 1" in said
        assert "micro-batch 1, input is not the same" in said
        assert "rank=mesh.data_axes.rank" in said


def told(batches: list[Any]) -> str:
    with Mesh.from_env(Plan(tp=2, dp_replicate=2)) as mesh:
        try:
            refuse_unlike_batches([batches[mesh.rank]], mesh)
        except DataError as exc:
            return str(exc)
    return ""


def test_the_array_that_differs_is_named_to_all_ranks(ranks: RankPools) -> None:
    alike, other = {"a": [torch.ones(2), torch.zeros(3)]}, {"a": [torch.ones(2), torch.ones(3)]}
    assert ranks(4, told, [alike, alike, other, other]) == [""] * 4
    for said in ranks(4, told, [alike, alike, other, alike]):
        assert "Ranks 2 and 3" in said
        assert "a[1] is not the same" in said
    for said in ranks(4, told, [alike, {"a": [torch.ones(2)]}, other, other]):
        assert "Ranks 0 and 1" in said
    shorter = {"a": [torch.ones(2), torch.zeros(1, 3)]}
    assert all("a[1]" in said for said in ranks(4, told, [alike, shorter, other, other]))
