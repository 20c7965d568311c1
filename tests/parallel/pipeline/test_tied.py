"""Tests of parameters that several stages hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from alone import AloneMesh
from models import MODELS
from rank_pool import RankPools
from torch import Tensor

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import parallelize
from trainfleet.parallel.blocks import find_blocks
from trainfleet.parallel.pipeline import deal_out
from trainfleet.parallel.pipeline.tied import refuse_unlike_holders, sum_tied_gradients
from trainfleet.parallel.spread import spread_of
from trainfleet.plan import Plan

CASE = MODELS["recurrent"]


def summed() -> list[Tensor | None]:
    """The gradient of the tied matrix where both, one and none of its holders have one."""
    found: list[Tensor | None] = []
    with Mesh.from_env(Plan(pp=2)) as mesh:
        model = parallelize(CASE.build(0), mesh, Plan(pp=2), example=CASE.micro_batch(0, 0))
        pipeline = spread_of(model).pipeline
        assert pipeline is not None
        for have in ({0, 1}, {1}, set[int]()):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 10.0**mesh.rank) if mesh.rank in have else None
            sum_tied_gradients(pipeline, model)
            tied = dict(model.named_parameters()).get("embedding.weight")
            found.append(None if tied is None or tied.grad is None else tied.grad)
    return found


def test_every_holder_gets_the_sum_of_all_of_them(ranks: RankPools) -> None:
    for both, one, none in ranks(2, summed):
        assert both.eq(11).all()
        assert one.eq(10).all()
        assert none is None


def test_holders_that_lay_it_out_differently_are_refused() -> None:
    model = CASE.build(0)
    mesh: Any = AloneMesh(0, 2, {"embedding.weight": "(Shard(dim=0),) [8, 12]"})
    pipeline = deal_out(model, find_blocks(model), mesh, Plan(pp=2), CASE.micro_batch(0, 0))
    with pytest.raises(
        PlanError, match=r"embedding.weight is tied .* \(Shard\(dim=0\),\) \[8, 12\] and whole \[16, 12\]"
    ):
        refuse_unlike_holders(pipeline, model)
