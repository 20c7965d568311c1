"""DeepSpeed is told of our groups and loaded for our device."""

from __future__ import annotations

import os

import pytest
import torch

from trainfleet.deps import installed
from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel.deepspeed import library
from trainfleet.plan import Plan

pytestmark = pytest.mark.skipif(installed("deepspeed") is None, reason="DeepSpeed is not installed")


def refused() -> tuple[str, str]:
    plan = Plan()
    with Mesh.from_env(plan) as mesh:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1, "reduce_bucket_size": -1}}
        with pytest.raises(PlanError) as caught:
            library.initialize(model, optimizer, config, mesh)
        return str(caught.value), os.environ["DS_ACCELERATOR"]


def test_what_it_refuses_is_told_as_a_plan_that_cannot_work(ranks) -> None:
    for said, accelerator in ranks(2, refused):
        assert said.startswith("DeepSpeed refuses this configuration")
        assert accelerator == "cpu"


def linear_layers_of_stage_3() -> tuple[bool, bool, bool]:
    plain = torch.nn.functional.linear
    with Mesh.from_env(Plan(zero=3)) as mesh:
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(model.parameters())
        engine = library.initialize(
            model, optimizer, {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}, mesh
        )
        left = torch.nn.functional.linear is plain
        with library.linear_layers(engine):
            inside = torch.nn.functional.linear is plain
        return left, inside, torch.nn.functional.linear is plain


def test_it_leaves_torchs_linear_layers_to_other_models(ranks) -> None:
    assert ranks(2, linear_layers_of_stage_3) == [(True, False, True)] * 2
