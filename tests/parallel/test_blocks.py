"""Blocks are found where modules repeat, or by name."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from trainfleet.errors import PlanError
from trainfleet.parallel.blocks import find_blocks, is_named


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        self.norm = nn.LayerNorm(2)


class Attention(Block):
    pass


class Model(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def names(model: nn.Module, *patterns: str) -> list[str]:
    called = {module: name for name, module in reversed(list(model.named_modules()))}
    return [called[block] for block in find_blocks(model, patterns)]


def blocks(count: int, cls: Any = Block) -> list[nn.Module]:
    return [cls() for _ in range(count)]


shared = Block()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(2, 2), []),
        (Model(layers=nn.ModuleList(blocks(2)), head=nn.Linear(2, 2)), ["layers.0", "layers.1"]),
        (nn.Sequential(nn.Linear(2, 2), *blocks(2)), ["1", "2"]),
        (Model(layers=nn.ModuleDict({"a": Block(), "b": Block()})), ["layers.a", "layers.b"]),
        (Model(layers=nn.ModuleList([Block(), Attention(), Block()])), ["layers.0", "layers.2"]),
        (Model(layers=nn.ModuleList(blocks(1))), []),
        (Model(layers=nn.ModuleList(nn.Linear(2, 2) for _ in range(3))), []),
        (Model(layers=nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Tanh()) for _ in range(2))), []),
        # The lists of a U-Net are never called: their members are.
        (
            Model(down=nn.ModuleList(nn.ModuleList([Block(), Attention()]) for _ in range(2))),
            ["down.0.0", "down.0.1", "down.1.0", "down.1.1"],
        ),
        # A tower in a tower: the outer list repeats nothing, the inner ones do.
        (
            Model(towers=nn.ModuleDict({"text": Model(layers=nn.ModuleList(blocks(2))), "image": Block()})),
            ["towers.text.layers.0", "towers.text.layers.1"],
        ),
        (Model(layers=nn.ModuleList([shared, shared, Block()])), ["layers.0", "layers.2"]),
        (nn.Transformer(4, 1, 2, 2, 4), [f"{side}.layers.{i}" for side in ("encoder", "decoder") for i in (0, 1)]),
    ],
)
def test_repeated_members_of_lists_are_blocks(model: nn.Module, expected: list[str]) -> None:
    assert names(model) == expected


def test_named_blocks_come_in_the_order_of_the_model_outermost_first() -> None:
    model = Model(stem=Block(), layers=nn.ModuleList(blocks(2)))
    assert names(model, "layers.*") == ["layers.0", "layers.1"]
    assert names(model, "*.mlp", "Block") == ["stem", "stem.mlp", "layers.0", "layers.1"]
    assert names(model, "layers.*.mlp", "layers.?") == ["layers.0", "layers.0.mlp", "layers.1", "layers.1.mlp"]
    assert names(model, "LayerN*") == ["stem.norm", "layers.0.norm", "layers.1.norm"]


def test_a_star_stands_for_one_part_of_a_name() -> None:
    module = Block()
    assert is_named("layers.0", module, "layers.*") and not is_named("layers.0.mlp", nn.ReLU(), "layers.*")
    assert is_named("layers.0", module, "Block") and not is_named("layers.0", module, "block")
    assert not is_named("", module, "*"), "the model itself is no part of it"


def test_a_pattern_without_a_match_or_on_a_list_is_refused() -> None:
    model = Model(layers=nn.ModuleList(blocks(2)))
    with pytest.raises(PlanError, match=r"'Blok', but no module of Model .* Block, LayerNorm, Linear"):
        find_blocks(model, ("Blok",))
    with pytest.raises(PlanError, match=r"the ModuleList layers: .* Name its members: 'layers.\*'"):
        find_blocks(model, ("layers",))
