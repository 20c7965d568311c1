"""Tests of models that hold some of their stages."""

from __future__ import annotations

import pytest
import torch
from followed import in_stages
from models import MODELS
from torch import Tensor, nn

from trainfleet.parallel.deferred import deferred, materialize
from trainfleet.parallel.pipeline.cut import Elsewhere, is_held, keep_stages
from trainfleet.parallel.pipeline.shadow import Shadow


def cut(name: str, count: int, held: set[int], model: nn.Module | None = None) -> nn.Module:
    model = model or MODELS[name].build(0)
    stages = in_stages(MODELS[name].build(0), MODELS[name].micro_batch(0, 0), count)[1]
    keep_stages(model, Shadow(model, "cpu").model, stages, held)
    return model


@pytest.mark.parametrize(("name", "count"), [("transformer", 4), ("convolutional", 3), ("scalars", 2), ("own_loss", 3)])
def test_all_parts_together_are_the_whole_under_its_names(name: str, count: int) -> None:
    whole = MODELS[name].build(0).state_dict()
    found: dict[str, Tensor] = {}
    for stage in range(count):
        part = cut(name, count, {stage}).state_dict()
        assert len(part) < len(whole)
        found |= part
    assert sorted(found) == sorted(whole)
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_a_tied_parameter_keeps_its_first_name_at_both_ends() -> None:
    first, last = cut("recurrent", 2, {0}), cut("recurrent", 2, {1})
    assert "embedding.weight" in dict(first.named_parameters())
    names = dict(last.named_parameters())
    assert "embedding.weight" in names
    assert "head.weight" not in names
    assert last.head.weight is names["embedding.weight"]
    assert isinstance(last.embedding, Elsewhere)


def test_what_stands_for_a_module_knows_its_kind_and_cannot_be_called() -> None:
    model = cut("transformer", 2, {0})
    assert isinstance(model.head, Elsewhere)
    assert not list(model.head.parameters())
    assert model.head.in_features == 16
    assert model.head.weight.device.type == "cpu"
    assert not is_held(model, "head")
    assert is_held(model, "blocks.0.qkv")
    with pytest.raises(RuntimeError, match="held by stage 1 of the pipeline"):
        model.head(torch.zeros(1, 16))
    other = cut("transformer", 2, {1})
    assert "positions" not in dict(other.named_parameters())
    assert other.positions.shape == (8, 16)


@pytest.mark.parametrize("held", [{0}, {1}])
def test_a_deferred_model_is_filled_with_the_same_numbers(held: set[int]) -> None:
    def built() -> nn.Module:
        return MODELS["recurrent"].model()

    torch.manual_seed(3)
    expected = built().state_dict()
    torch.manual_seed(3)
    model = cut("recurrent", 2, held, deferred(built))
    materialize(model, "cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name])
    if held == {1}:
        assert model.head.weight is model.embedding.weight
