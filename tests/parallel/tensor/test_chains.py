"""Chains of convolutions are found by structure, and split they compute what one process computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cluster.test_pipelines import check
from oracle import hold, traces
from rank_pool import RankPools
from split_models import adamw
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import parallelize
from trainfleet.parallel.spread import spread_of
from trainfleet.parallel.tensor.chains import paired
from trainfleet.parallel.tensor.find import find_regions
from trainfleet.parallel.tensor.layer import Layer
from trainfleet.plan import Plan
from trainfleet.training.proof.verdict import compare
from trainfleet.training.proof.verify import Case


def layers(*shapes: tuple[int, ...] | None) -> list[Any]:
    return [
        each and (str(i), Layer(each[0], each[1], 0, each[2] if len(each) > 2 else 1, True))
        for i, each in enumerate(shapes)
    ]


@pytest.mark.parametrize(
    ("shapes", "pairs"),
    [
        ([(3, 8), (8, 8)], [("0", "1")]),
        ([(3, 8), (8, 16), (16, 16), (16, 4), (4, 4)], [("0", "1"), ("2", "3")]),
        ([(8, 32), (32, 32, 32), (32, 8)], [("01", "2")]),
        ([(8, 8, 8), (8, 16)], [("0", "1")]),
        ([(8, 32), (32, 32, 3), (32, 8)], []),
        ([(8, 7), (7, 8), (8, 3)], [("1", "2")]),
        ([(8, 8), None, (8, 8)], []),
        ([(8, 16), (8, 16)], []),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_convolutions_that_follow_each_other_are_paired(shapes, pairs):
    assert [("".join(columns), row) for columns, row in paired(layers(*shapes), 2)] == pairs


def unit(ins: int, outs: int, **options: Any) -> nn.Sequential:
    options = {"padding": 1, "bias": False, **options}  # the gradient of a bias would be zero but for rounding
    return nn.Sequential(nn.Conv2d(ins, outs, 3, **options), nn.BatchNorm2d(outs), nn.ReLU(inplace=True))


class Inverted(nn.Module):
    """A convolution by channels between two that mix them (Sandler et al., arXiv:1801.04381)."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.expand, self.apart = unit(width, wide), unit(wide, wide, groups=wide)
        self.project, self.norm = nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.project(self.apart(self.expand(x))))


class Images(nn.Module):
    """[B, 3, 8, 8] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.inverted = Inverted(8, 16)
        self.grouped = nn.Sequential(
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.GroupNorm(4, 16),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 8, 1),
            nn.Dropout(0.0),
        )
        self.back = nn.Sequential(
            nn.ConvTranspose2d(8, 6, 2, 2, bias=False), nn.InstanceNorm2d(6), nn.ConvTranspose2d(6, 4, 1, bias=False)
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(4 * 4 * 4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU6(), nn.Linear(8, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(self.grouped(self.inverted(self.stem(x)))))


def images(number: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(number)
    return {"input": torch.randn(4, 3, 8, 8, generator=draw), "target": torch.randint(5, (4,), generator=draw)}


def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch["target"])


CASE = Case(build=Images, loss_fn=loss, micro_batch=images, optimizer=adamw, steps=2, accumulation=2, clip_norm=0.5)
FOUND = {
    "inverted": (("inverted.expand.0", "inverted.apart.0"), ("inverted.project",)),
    "grouped": (("grouped.0",), ("grouped.4",)),
    "back": (("back.0",), ("back.2",)),
    "head": (("head.1",), ("head.4",)),
}


def test_chains_are_found_in_the_smallest_modules_that_hold_them():
    assert {r.name: (r.columns, r.rows) for r in find_regions(Images(), 2)} == FOUND
    left = {r.name for r in find_regions(Images(), 2, ["inverted.apart", "grouped.4", "BatchNorm1d"])}
    assert left == {"back", "head"}
    of_four = {r.name for r in find_regions(Images(), 4)}
    assert of_four == {"inverted", "grouped", "head"}  # four do not divide the six channels of `back`


def test_what_is_not_known_to_work_channel_by_channel_breaks_a_chain():
    for between in (nn.GroupNorm(1, 8), nn.Dropout2d(), nn.PReLU(8), nn.LayerNorm(4), nn.SyncBatchNorm(8)):
        with pytest.raises(PlanError, match="Sequential has no layers that can be split"):
            find_regions(nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.Conv2d(8, 4, 1)), 2)


def test_a_module_with_other_split_layers_in_it_leaves_its_convolutions_whole():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)))
    assert [region.name for region in find_regions(model, 2)] == ["2"]


def test_convolutions_that_the_plan_names_are_split_as_it_says():
    said = {"columns": ["stem.0", "inverted.apart.0"], "rows": ["inverted.project"]}
    found = {r.name: (r.columns, r.rows) for r in find_regions(Images(), 2, **said)}
    assert found["stem.0"] == (("stem.0",), ()) and found["inverted"] == (("inverted.apart.0",), ("inverted.project",))
    with pytest.raises(PlanError, match=r"plan\.tp_rows names inverted\.apart\.0, a convolution of 16 groups"):
        find_regions(Images(), 2, rows=["inverted.apart.0"])
    with pytest.raises(PlanError, match=r"plan\.tp=3 does not divide groups=16 of inverted\.apart\.0"):
        find_regions(Images(), 3, columns=["inverted.apart.0"], whole=["head"])


SPLIT = [Plan(tp=2), Plan(tp=2, zero=3), Plan(tp=2, tp_columns=("stem.0",), tp_rows=("grouped.0",))]


@pytest.mark.parametrize("plans", [SPLIT[:1], pytest.param(SPLIT[1:], marks=pytest.mark.matrix)])
def test_two_ranks_compute_what_one_process_computes(ranks: RankPools, plans: list[Plan]) -> None:
    hold(ranks, 2, CASE, plans)


def test_batch_statistics_of_split_channels_are_those_of_all_ranks(ranks: RankPools) -> None:
    plan = Plan(tp=2, tp_whole=("grouped",))
    (alone,), (found,) = ranks(2, traces, CASE, [Plan()])[0], ranks(4, traces, CASE, [plan])[0]
    verdict = compare(alone, found, "fp32")
    assert verdict.holds, str(verdict)


def told() -> tuple[str, list[tuple[int, ...]]]:
    with Mesh.from_env(Plan(tp=2)) as mesh:
        torch.manual_seed(0)
        model = parallelize(Images(), mesh, Plan(tp=2))
        model.eval()
        with torch.no_grad():
            output = model(images(0)["input"])
        torch.manual_seed(0)
        torch.testing.assert_close(output, Images().eval()(images(0)["input"]))
        sides = ("inverted.expand.0", "inverted.apart.0", "inverted.project", "back.0", "back.2", "stem.0")
        weights = [model.get_submodule(name).weight for name in sides]
        return str(spread_of(model).split), [tuple(getattr(w, "to_local", lambda w=w: w)().shape) for w in weights]


def test_each_rank_holds_its_channels_and_the_line_says_how_much_is_split(ranks: RankPools) -> None:
    for line, shapes in ranks(2, told):
        assert line.startswith("90 % of the parameters are split, in") and "whole on each: stem.0, stem.1" in line
        assert shapes == [(8, 8, 3, 3), (8, 1, 3, 3), (8, 8, 1, 1), (8, 3, 2, 2), (3, 4, 1, 1), (8, 3, 3, 3)]


@pytest.mark.matrix
def test_stages_hold_split_convolutions(ranks: RankPools) -> None:
    check(ranks, 4, CASE, Plan(tp=2, pp=2, blocks=("inverted", "grouped", "back", "head")))
