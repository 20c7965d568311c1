"""Tests of copies without numbers."""

from __future__ import annotations

import threading

import pytest
import torch
from models import MODELS
from torch import nn

from trainfleet.errors import PlanError
from trainfleet.parallel.deferred import deferred, is_deferred
from trainfleet.parallel.pipeline.shadow import Shadow
from trainfleet.parallel.torch_private import FakeTensor


@pytest.mark.parametrize("name", MODELS)
def test_a_shadow_has_every_tensor_and_no_numbers(name: str) -> None:
    model = MODELS[name].build(0)
    shadow = Shadow(model, "cpu").model
    ours, theirs = dict(model.state_dict(keep_vars=True)), dict(shadow.state_dict(keep_vars=True))
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        assert isinstance(tensor, FakeTensor)
        assert (tensor.shape, tensor.dtype, tensor.requires_grad, tensor.device) == (
            ours[key].shape,
            ours[key].dtype,
            ours[key].requires_grad,
            torch.device("cpu"),
        )
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in shadow.named_parameters()]  # tied ones too


def test_the_shadow_of_a_deferred_model_waits_for_nothing() -> None:
    model = deferred(MODELS["transformer"].model)
    shadow = Shadow(model, "cpu").model
    assert is_deferred(model)
    assert not is_deferred(shadow)
    assert shadow.head.weight.device.type == "cpu"


def test_what_cannot_be_copied_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(PlanError, match="cannot be copied"):
        Shadow(model, "cpu")
    with pytest.raises(PlanError, match="do not know their shape"):
        Shadow(nn.LazyLinear(2), "cpu")
