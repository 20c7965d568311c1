"""Tests of what each rank says of the stages that others hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from alone import AloneMesh
from models import MODELS

from trainfleet.errors import CheckpointError
from trainfleet.parallel.blocks import find_blocks
from trainfleet.parallel.pipeline import Pipeline, deal_out
from trainfleet.parallel.pipeline.states import absent_averages, absent_state, whole_memory
from trainfleet.plan import Plan
from trainfleet.state import ShardedArray


def pipeline_of(name: str, others: Any = None) -> Pipeline:
    model = MODELS[name].build(0)
    mesh: Any = AloneMesh(0, 2, others)
    return deal_out(model, find_blocks(model), mesh, Plan(pp=2), MODELS[name].micro_batch(0, 0))


def test_places_complete_the_state_of_the_whole_and_hold_nothing() -> None:
    pipeline = pipeline_of("convolutional")
    ours = pipeline.model.state_dict()
    absent = absent_state(pipeline, ours)
    whole = MODELS["convolutional"].build(0).state_dict()
    assert not set(absent) & set(ours)
    assert sorted([*absent, *ours]) == sorted(whole)
    for name, piece in absent.items():
        assert piece.global_shape == tuple(whole[name].shape)
        assert piece.dtype == str(whole[name].dtype).removeprefix("torch.")
        assert piece.replica  # never stored from here
        assert piece.local.numel() == (0 if piece.global_shape else 1)


def test_only_what_is_trained_has_an_average() -> None:
    pipeline = pipeline_of("scalars")
    trained = {name for name, p in MODELS["scalars"].build(0).named_parameters() if p.requires_grad}
    assert set(absent_averages(pipeline, [])) == trained


def test_the_memory_of_other_stages_is_told_by_their_ranks() -> None:
    entry = {"shape": [4, 16], "dtype": "float32"}
    theirs = {"memory": {"head.bias": {"exp_avg": entry, "note": {"value": 3}}}, "started": ["head.bias"], "groups": 1}
    pipeline = pipeline_of("transformer", theirs)
    own = ShardedArray(name="positions.exp_avg", global_shape=(2,), offsets=(0,), local=torch.ones(2))
    state = {"memory": {"positions": {"exp_avg": own}}, "started": ["positions"], "groups": [{"lr": 1.0}]}
    found = whole_memory(pipeline, state)
    assert list(found["memory"]) == ["positions", "head.bias"]
    assert found["memory"]["positions"]["exp_avg"] is own
    assert found["memory"]["head.bias"]["note"] == 3
    assert found["memory"]["head.bias"]["exp_avg"].global_shape == (4, 16)
    assert found["started"] == ["positions", "head.bias"]
    assert found["groups"] == [{"lr": 1.0}]


def test_optimizers_with_other_groups_are_refused() -> None:
    pipeline = pipeline_of("transformer", {"memory": {}, "started": [], "groups": 2})
    with pytest.raises(CheckpointError, match="have 1 and 2 groups"):
        whole_memory(pipeline, {"memory": {}, "started": [], "groups": [{}]})
