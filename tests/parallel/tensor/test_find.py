"""Regions are found by structure: which layers are split by column, which by row, and what is refused."""

from __future__ import annotations

import pytest
from split_models import build
from torch import nn

from trainfleet.errors import PlanError
from trainfleet.parallel.tensor.find import find_regions, group
from trainfleet.parallel.tensor.layer import Layer


def layers(*shapes: tuple[int, int]) -> list[tuple[str, Layer]]:
    return [(str(i), Layer(*shape, 0)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("shapes", "groups"),
    [
        ([(8, 8)] * 4, [("012", "3")]),
        ([(8, 24), (8, 8)], [("0", "1")]),
        ([(8, 8), (8, 4), (8, 4), (8, 8)], [("012", "3")]),
        ([(8, 16), (8, 8), (8, 8), (16, 8)], [("012", "3")]),
        ([(8, 24), (8, 24), (24, 8)], [("01", "2")]),
        ([(8, 32), (32, 8)], [("0", "1")]),
        ([(8, 24), (8, 8), (8, 32), (32, 8)], [("0", "1"), ("2", "3")]),
        ([(8, 8), (8, 8), (8, 8), (8, 8), (8, 32), (32, 8)], [("012", "3"), ("4", "5")]),
        ([(8, 32), (32, 16), (16, 5)], [("0", "1")]),
        ([(8, 8)], []),
        ([(8, 5)], []),
        ([(8, 8)] * 3, []),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_layers_are_grouped_in_the_order_in_which_a_module_has_them(shapes, groups):
    assert [("".join(columns), row) for columns, row in group(layers(*shapes))] == groups


@pytest.mark.parametrize("name", ["separate", "grouped", "fused", "inline", "perceptron"])
def test_every_attention_and_perceptron_is_a_region(name):
    model = build(name)
    regions = find_regions(model, 2)
    split = {layer for region in regions for layer in (*region.columns, *region.rows)}
    linears = {each for each, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears - split == {"head"}
    assert all(row.rsplit(".")[-1] in ("o", "out", "down", "proj", "back") for r in regions for row in r.rows)


class Self(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))


class Output(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.self, self.output = Self(), Output()


class EncoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.intermediate, self.output = nn.Sequential(nn.Linear(8, 32)), nn.Sequential(nn.Linear(32, 8))


def test_an_attention_whose_layers_lie_in_two_modules_is_a_region():
    regions = find_regions(nn.Sequential(EncoderLayer(), EncoderLayer()), 2)
    assert [region.name for region in regions] == ["0.attention", "0", "1.attention", "1"]
    assert regions[0].columns == tuple(f"0.attention.self.{name}" for name in ("query", "key", "value"))
    assert regions[0].rows == ("0.attention.output.dense",)
    assert (regions[1].columns, regions[1].rows) == (("0.intermediate.0",), ("0.output.0",))


def test_what_the_plan_names_stays_whole():
    regions = find_regions(build("separate"), 2, ["SeparateAttention", "blocks.1.parts.1"])
    assert [region.name for region in regions] == ["blocks.0.parts.1"]
    with pytest.raises(PlanError, match="tp_whole names 'Nobody'"):
        find_regions(build("separate"), 2, ["Nobody"])


def test_layers_tied_to_others_stay_whole():
    model = build("perceptron")
    model.blocks[0].parts[0].up.weight = model.blocks[1].parts[0].up.weight
    with pytest.raises(PlanError, match="no layers that can be split"):
        find_regions(model, 2)


def test_batch_statistics_that_a_norm_exchanges_itself_keep_layers_whole():
    normed = nn.Sequential(nn.Linear(8, 8), nn.SyncBatchNorm(8), nn.Linear(8, 8))
    with pytest.raises(PlanError, match="no layers that can be split"):
        find_regions(normed, 2)
    assert [r.rows for r in find_regions(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)), 2)] == [
        ("2",)
    ]


def test_what_does_not_divide_is_refused_with_what_would():
    with pytest.raises(PlanError, match=r"plan\.tp=3 does not divide out_features=16.*Use one of 1, 2, 4, 8, 16"):
        find_regions(build("separate"), 3)
    model = build("separate")
    model.blocks[0].parts[0].num_heads = 4
    with pytest.raises(PlanError, match=r"plan\.tp=8 does not divide num_heads=4 .*1, 2, 4, .*tp_whole"):
        find_regions(model, 8)


def test_a_model_without_pairs_is_refused():
    with pytest.raises(PlanError, match=r"plan\.tp is 2, but Linear has no layers that can be split"):
        find_regions(nn.Linear(4, 4), 2)
