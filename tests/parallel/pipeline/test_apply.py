"""Tests of how a model is dealt out, and of what is refused before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from alone import AloneMesh
from models import MODELS
from torch import nn

from trainfleet.errors import PlanError
from trainfleet.parallel.blocks import find_blocks
from trainfleet.parallel.pipeline import Pipeline, deal_out, described
from trainfleet.plan import Plan

CASE = MODELS["transformer"]


def dealt(plan: Plan, rank: int = 0, model: nn.Module | None = None, example: Any = True) -> Pipeline:
    model = model or CASE.build(0)
    batch = CASE.micro_batch(0, 0) if example is True else example
    return deal_out(model, find_blocks(model), AloneMesh(rank, plan.pp), plan, batch)  # type: ignore[arg-type]


def test_each_rank_holds_its_stages() -> None:
    assert [dealt(Plan(pp=2), rank).held for rank in range(2)] == [[0], [1]]
    assert [dealt(Plan(pp=2, schedule="zbv"), rank).held for rank in range(2)] == [[0, 3], [1, 2]]
    pipeline = dealt(Plan(pp=2, stages=("blocks.1",)), 1)
    assert next(name for name, _ in pipeline.model.named_parameters()) == "blocks.1.norm.weight"
    assert described(pipeline) == "Pipeline of 2 stages on 2 ranks: 0 with tokens, 1 with blocks.1"


def test_what_is_tied_is_said() -> None:
    model = MODELS["recurrent"].build(0)
    pipeline = dealt(Plan(pp=2), 0, model, MODELS["recurrent"].micro_batch(0, 0))
    assert described(pipeline).endswith("; tied between stages: embedding.weight")


@pytest.mark.parametrize(
    ("plan", "example", "said"),
    [
        (Plan(pp=2), None, "Give a micro-batch"),
        (Plan(pp=8), True, "calls 4 modules"),
        (Plan(pp=2, schedule="1f1b", stages_per_rank=2), True, "each rank holds 1 stage"),
        (Plan(pp=2, stages=("block.1",)), True, "no such module"),
    ],
    ids=lambda each: str(each)[:20],
)
def test_what_cannot_be_is_refused_and_the_model_stays_as_it_was(plan: Plan, example: Any, said: str) -> None:
    model = CASE.build(0)
    before = [id(parameter) for parameter in model.parameters()]
    with pytest.raises(PlanError, match=said):
        dealt(plan, 0, model, example)
    assert [id(parameter) for parameter in model.parameters()] == before
    assert "forward" not in vars(model)


def test_a_rank_with_nothing_to_train_is_refused() -> None:
    model = CASE.build(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("blocks.1", "head")))
    with pytest.raises(PlanError, match=r"Rank 0 of plan\.pp=2 would hold no parameter that is trained"):
        dealt(Plan(pp=2, stages=("blocks.1",)), 0, model)


def test_the_example_is_cut_as_micro_batches_are() -> None:
    pipeline = dealt(Plan(pp=2, microbatches=2))
    assert len(pipeline.shadow.model.blocks) == 2
    with pytest.raises(Exception, match="does not divide the 2 samples"):
        dealt(Plan(pp=2, microbatches=3))


def test_layers_between_which_a_stage_may_begin_are_not_split() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mlp = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))  # noqa: E731
            self.blocks = nn.ModuleList(mlp() for _ in range(2))
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.down(self.up(x).relu())

    pipeline = dealt(Plan(pp=2, tp=2), 0, Wide(), torch.zeros(2, 4))
    assert [region.name for region in pipeline.regions] == ["blocks.0", "blocks.1"]
