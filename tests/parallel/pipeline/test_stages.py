"""Tests of which module belongs to which stage, and who holds what is shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from followed import followed, in_stages
from models import MODELS
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.parallel.blocks import find_blocks
from trainfleet.parallel.pipeline.stages import EVERYWHERE, divide, leaf_names


def stages_of(model: nn.Module, batch: Any, count: int, beginnings: tuple[str, ...] = ()) -> Any:
    return in_stages(model, batch, count, beginnings)[1]


class Line(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, width) for width in widths)
        self.back = nn.ModuleList(nn.Linear(width, 16) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        for out, back in zip(self.layers, self.back):
            x = back(out(x).relu())
        return x


def test_stages_are_balanced_by_what_is_computed_not_by_how_many_modules_there_are() -> None:
    homes = stages_of(Line((8, 8, 8, 8, 64)), torch.zeros(4, 16), 2).homes
    first = [name for name, stage in homes.items() if stage == 0]
    assert sorted(first) == sorted(f"{kind}.{i}" for i in range(4) for kind in ("layers", "back"))


def test_named_modules_begin_the_stages() -> None:
    model, batch = MODELS["transformer"].build(0), MODELS["transformer"].micro_batch(0, 0)
    homes = stages_of(model, batch, 3, ("blocks.1", "head")).homes
    assert homes == {"tokens": 0, "blocks.0": 0, "blocks.1": 1, "head": 2}
    inner = stages_of(model, batch, 2, ("blocks.1.mlp",)).homes  # a block may be cut where it is said
    assert inner["blocks.1.norm"] == 0
    assert inner["blocks.1.mlp"] == 1


@pytest.mark.parametrize(
    ("beginnings", "said"),
    [(("heads",), "no such module"), (("blocks.1", "blocks.0"), "does not come after"), (("tokens",), "does not come")],
)
def test_names_that_cannot_begin_stages_are_refused(beginnings: tuple[str, ...], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        stages_of(MODELS["transformer"].build(0), MODELS["transformer"].micro_batch(0, 0), 3, beginnings)


def test_too_few_modules_are_refused_with_their_names() -> None:
    with pytest.raises(PlanError, match=r"calls 3 modules .*stem, blocks.0, blocks.1.* 4 stages"):
        stages_of(MODELS["own_loss"].build(0), MODELS["own_loss"].micro_batch(0, 0), 4)


def test_a_tied_matrix_is_held_at_both_ends_and_an_unused_one_once() -> None:
    tied = stages_of(MODELS["recurrent"].build(0), MODELS["recurrent"].micro_batch(0, 0), 3).parameters
    assert tied["embedding.weight"] == (0, 2)
    assert "head.weight" not in tied
    scalars = stages_of(MODELS["scalars"].build(0), MODELS["scalars"].micro_batch(0, 0), 2).parameters
    assert all(len(held) == 1 for held in scalars.values())
    assert set(scalars) == {name for name, _ in MODELS["scalars"].build(0).named_parameters()}


def test_modules_without_a_state_are_everywhere() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(inplace=True))
    assert stages_of(model, torch.zeros(2, 4), 2).leaves == {
        "0": (0,),
        "1": (EVERYWHERE,),
        "2": (1,),
        "3": (EVERYWHERE,),
    }


class Returns(nn.Module):
    """Comes back to its first layer, and its batch norm, after the second."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4) if norm else nn.Identity())
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a[1](self.a[0](self.b(self.a[1](self.a[0](x)))))


def test_a_module_that_is_called_again_later_is_held_there_too_unless_it_keeps_statistics() -> None:
    assert stages_of(Returns(False), torch.zeros(3, 4), 2, ("b",)).leaves["a.0"] == (0, 1)
    with pytest.raises(PlanError, match="keeps statistics over batches"):
        stages_of(Returns(True), torch.zeros(3, 4), 2, ("b",))


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        kept = first[:, :2]
        second = self.b(first.clone())
        first.mul_(second)
        return kept.sum() + first.sum()


def test_writing_into_what_another_stage_has_is_refused() -> None:
    with pytest.raises(PlanError, match=r"mul_ writes into a tensor that another stage computes"):
        stages_of(Overwrites(), torch.zeros(3, 4), 2)


def test_without_blocks_the_smallest_modules_are_leaves_and_with_them_the_largest() -> None:
    plain = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    assert leaf_names(plain, find_blocks(plain)) == ["0.0", "0.1", "1"]
    model = MODELS["recurrent"].build(0)
    assert leaf_names(model, find_blocks(model)) == ["embedding", "blocks.0", "blocks.1", "head"]


def test_every_forward_of_the_same_modules_is_placed_alike() -> None:
    model = MODELS["transformer"].build(0)
    graph, shadow, leaves = followed(model, MODELS["transformer"].micro_batch(0, 0))
    again, _, _ = followed(model, {"input": torch.zeros(5, 3, dtype=torch.int64)})
    assert divide(graph, shadow.model, leaves, 3).homes == divide(again, shadow.model, leaves, 3).homes
