"""Convolutions of pieces give what those of the whole give: values, and the gradients of inputs, weights and biases."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rank_pool import RankPools
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from trainfleet.mesh import Mesh
from trainfleet.parallel.tensor.exchange import placed
from trainfleet.parallel.tensor.region import on_pieces
from trainfleet.plan import Plan

FORMS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "1d": (F.conv1d, (7,), {"stride": 2, "padding": 1}),
    "2d": (F.conv2d, (6, 5), {"padding": "same", "dilation": 2}),
    "3d": (F.conv3d, (4, 3, 5), {"stride": (1, 2, 1)}),
    "transposed 1d": (F.conv_transpose1d, (5,), {"stride": 2, "output_padding": 1}),
    "transposed 2d": (F.conv_transpose2d, (4, 3), {"padding": 1, "dilation": 2}),
    "transposed 3d": (F.conv_transpose3d, (2, 3, 2), {"stride": 2}),
}
ALL = (Replicate(), Shard(0), Shard(1))


def numbers(form: str, groups: int, bias: bool) -> list[Tensor | None]:
    _, places, _ = FORMS[form]
    generator = torch.Generator().manual_seed(0)
    kernel = [3] * len(places)
    width = (8, 12 // groups) if form.startswith("transposed") else (12, 8 // groups)
    found = [torch.randn(shape, generator=generator) for shape in ((2, 8, *places), (*width, *kernel), (12,))]
    return [*found[:2], found[2] if bias else None]


def compute(form: str, groups: int, bias: bool, lies: tuple[Any, Any, Any] | None, seen: list[str]) -> list[Tensor]:
    function, _, options = FORMS[form]
    given = [None if each is None else each.requires_grad_() for each in numbers(form, groups, bias)]

    def forward(*given: Tensor | None) -> Tensor:
        if lies is not None:
            given = tuple(each if each is None else placed(each, at) for each, at in zip(given, lies, strict=True))
        y = function(*given, groups=groups, **options)
        seen.append(str(getattr(y, "placements", "")))
        return y

    if lies is None:
        y = forward(*given)
    else:
        with Mesh.from_env(Plan(tp=2)) as mesh:
            y = on_pieces(forward, form, mesh.torch["tp"])(*given)
    (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
    return [y.detach(), *(each.grad for each in given if each is not None)]


def wrong(forms: list[str], inputs: tuple[Any, ...], weights: tuple[Any, ...]) -> list[str]:
    found = []
    for form, groups, bias in itertools.product(forms, (1, 4), (True, False)):
        expected = compute(form, groups, bias, None, [])
        for of_input, of_weight in itertools.product(inputs, weights):
            try:
                made = compute(form, groups, bias, (of_input, of_weight, Replicate()), [])
            except Exception as exc:
                found.append(f"{form} {groups} {bias} {of_input} {of_weight}: {exc}"[:300])
                continue
            for what, one, other in zip(("value", "input", "weight", "bias"), expected, made):
                if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
                    found.append(f"{form} {groups} {bias} {of_input} {of_weight}: {what}")
    return found


def test_convolutions_of_pieces_give_what_the_whole_gives(ranks: RankPools) -> None:
    assert ranks(2, wrong, ["2d", "transposed 1d"], ALL[::2], ALL[1:]) == [[], []]


@pytest.mark.matrix
def test_every_form_lying_in_any_way_gives_what_the_whole_gives(ranks: RankPools) -> None:
    assert ranks(2, wrong, list(FORMS), (*ALL, Shard(2)), ALL) == [[], []]


def lain() -> list[str]:
    """How what convolutions give lies, by how input and weight lie."""
    seen: list[str] = []
    for form, groups, lies in [
        ("2d", 1, (Replicate(), Shard(0))),
        ("2d", 1, (Shard(1), Shard(1))),
        ("2d", 1, (Shard(1), Replicate())),
        ("2d", 4, (Shard(1), Shard(0))),
        ("2d", 4, (Shard(1), Replicate())),
        ("transposed 1d", 1, (Shard(1), Shard(1))),
        ("transposed 1d", 1, (Replicate(), Shard(0))),
    ]:
        compute(form, groups, True, (*lies, Replicate()), seen)
    return ["pieces" if "Shard(dim=1)" in each else "whole" for each in seen]


def test_only_what_is_summed_over_ranks_comes_out_whole(ranks: RankPools) -> None:
    assert ranks(2, lain)[0] == ["pieces", "whole", "whole", "pieces", "pieces", "pieces", "whole"]
