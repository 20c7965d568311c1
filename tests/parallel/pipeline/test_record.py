"""Tests of what is seen of a forward, and what is refused."""

from __future__ import annotations

import pytest
import torch
from followed import followed
from models import MODELS
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.parallel.pipeline.graph import Named
from trainfleet.parallel.pipeline.record import fingerprint


def test_leaves_and_the_functions_between_them_are_seen_in_order() -> None:
    graph, _, _ = followed(MODELS["transformer"].build(0), MODELS["transformer"].micro_batch(0, 0))
    names = [node.name for node in graph.nodes]
    assert names == ["tokens", "__getitem__", "add", "blocks.0", "blocks.1", "head"]
    assert graph.nodes[1].reads() == [Named("positions", True)]
    assert graph.kinds[graph.output.number].shape == (2, 8, 16)
    assert graph.nodes[3].cost > 10 * graph.nodes[2].cost


def test_dropout_draws_and_attention_without_it_does_not() -> None:
    for rate, draws in ((0.0, False), (0.3, True)):
        model = MODELS["transformer"].build(0, dropout=rate)
        graph, _, _ = followed(model, MODELS["transformer"].micro_batch(0, 0))
        assert {node.name: node.is_random for node in graph.nodes}["blocks.0"] is draws


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(3))


class Branches(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if x.sum() > 0 else x


class Reads(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * int(x[0, 0]))


class Differentiates(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.autograd.grad(y.sum(), self.a.weight, create_graph=True)[0])


class Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Hides(Model):
    def __init__(self) -> None:
        super().__init__()
        self.b.forward = lambda box: box.tensor  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Box(self.a(x)))


class Remembers(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.seen.add_(y.detach().mean(0))
        return self.b(y)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Branches(), "depends on the numbers in a tensor"),
        (Reads(), "depends on the numbers in a tensor"),
        (Differentiates(), "calls torch.autograd.grad between modules"),
        (Hides(), "takes or gives a Box, which holds tensors"),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, nn.Module) else "",
)
def test_what_cannot_be_followed_is_refused_with_its_line(model: nn.Module, said: str) -> None:
    with pytest.raises(PlanError, match=said) as caught:
        followed(model, torch.ones(3, 3))
    assert "test_record.py:" in str(caught.value)


def test_the_numbers_of_the_model_are_left_alone() -> None:
    model = Remembers()
    followed(model, torch.ones(3, 3))
    assert not model.seen.any()
    assert all(parameter.grad is None and not hasattr(parameter, "fake_mode") for parameter in model.parameters())


def test_modules_are_alike_where_all_their_settings_are() -> None:
    alike = [nn.Sequential(nn.Conv2d(3, 3, 3), nn.Dropout(0.1)) for _ in range(2)]
    assert fingerprint(alike[0]) == fingerprint(alike[1])
    for other in (
        nn.Sequential(nn.Conv2d(3, 3, 3, stride=2), nn.Dropout(0.1)),
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.Dropout(0.2)),
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.Dropout(0.1)).eval(),
    ):
        assert fingerprint(alike[0]) != fingerprint(other)
