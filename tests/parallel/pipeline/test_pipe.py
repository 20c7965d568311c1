"""Tests of what a rank knows of the whole pipeline."""

from __future__ import annotations

import pytest
import torch
from alone import AloneMesh
from models import MODELS

from trainfleet.batch import call_with_batch
from trainfleet.errors import PlanError
from trainfleet.parallel.blocks import find_blocks
from trainfleet.parallel.pipeline import Pipeline, deal_out
from trainfleet.parallel.pipeline.graph import Named
from trainfleet.plan import Plan


def pipeline_of(name: str, rank: int, size: int = 2) -> Pipeline:
    model = MODELS[name].build(0)
    mesh = AloneMesh(rank, size)
    return deal_out(model, find_blocks(model), mesh, Plan(pp=size), MODELS[name].micro_batch(0, 0))  # type: ignore[arg-type]


def test_copies_are_counted_by_their_holders() -> None:
    for rank in range(3):
        pipeline = pipeline_of("recurrent", rank, 3)
        assert pipeline.tied() == ["embedding.weight"]
        assert pipeline.holders("embedding.weight") == [0, 2]
        if rank != 1:
            assert pipeline.copy_of("embedding.weight") == (0 if rank == 0 else 1)
    matcher = pipeline_of("own_loss", 1)
    assert matcher.copy_of("sharpness") == 1  # a buffer beside the blocks, which every rank has


def test_a_program_serves_all_inputs_of_its_shapes_and_modes() -> None:
    pipeline = pipeline_of("transformer", 0)
    batches = [MODELS["transformer"].micro_batch(0, i) for i in range(2)]
    program = pipeline.program(call_with_batch, batches[0])
    assert pipeline.program(call_with_batch, batches[1]) is program
    shorter = {key: value[:, :5] for key, value in batches[0].items()}
    assert pipeline.program(call_with_batch, shorter) is not program
    with torch.no_grad():
        evaluation = pipeline.program(call_with_batch, batches[0])
    assert evaluation is not program
    assert not any(kind.requires_grad for kind in evaluation.kinds(evaluation.crossings[0]))
    pipeline.model.eval()
    assert pipeline.program(call_with_batch, batches[0]) is not program


def test_names_lead_to_what_is_here_now() -> None:
    pipeline = pipeline_of("transformer", 0)
    positions = Named("positions", True)
    assert pipeline.find(positions) is pipeline.model.positions
    pipeline.model.positions = torch.nn.Parameter(torch.zeros(8, 16))  # as sharding replaces it
    assert pipeline.find(positions) is pipeline.model.positions
    assert pipeline.find("blocks.0") is pipeline.model.blocks[0]


def test_names_are_put_into_the_order_of_the_model() -> None:
    pipeline = pipeline_of("transformer", 0)
    names = list(dict(MODELS["transformer"].build(0).named_parameters()))
    assert pipeline.sorted_names(sorted(names)) == names
    with pytest.raises(KeyError):
        pipeline.sorted_names(["strange"])


class TwoWays(torch.nn.Module):
    """Takes its layers in one order in training and in the other in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers if self.training else reversed(self.layers):
            x = layer(x)
        return x


def test_a_forward_that_takes_another_way_than_the_example_is_refused() -> None:
    model = TwoWays()
    pipeline = deal_out(model, [], AloneMesh(0, 2), Plan(pp=2), torch.zeros(2, 3))  # type: ignore[arg-type]
    model.eval()
    with pytest.raises(PlanError, match=r"stage 1 of the pipeline would need layers\.0, which stage 0 holds"):
        pipeline.program(call_with_batch, torch.zeros(2, 3))
