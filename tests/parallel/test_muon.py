"""Muon on shards is, bit by bit, torch's Muon on whole matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from trainfleet.parallel.muon import GatheredMuon

SHAPES = [(6, 4), (7, 9), (1, 5)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"nesterov": False, "weight_decay": 0.0},
    {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.5, "ns_steps": 3},
]


def stepped(kind: type[torch.optim.Muon], options: dict[str, Any], ranks: int | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    mesh = init_device_mesh("cpu", (ranks,)) if ranks else None
    spread = (lambda whole: distribute_tensor(whole, mesh, [Shard(0)])) if ranks else (lambda whole: whole)
    parameters = [nn.Parameter(spread(torch.randn(shape, generator=generator))) for shape in SHAPES]
    parameters.append(nn.Parameter(spread(torch.ones(2, 2))))  # never gets a gradient
    optimizer = kind(parameters, lr=0.1, **options)
    for _ in range(3):
        for parameter, shape in zip(parameters, SHAPES):
            parameter.grad = spread(torch.randn(shape, generator=generator))
        optimizer.step()
    return [(p.full_tensor() if ranks else p).detach() for p in parameters]  # type: ignore[attr-defined]


def differs(options: dict[str, Any], size: int) -> bool:
    expected = stepped(torch.optim.Muon, options, None)
    found = stepped(GatheredMuon, options, size)
    return not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_on_shards_it_is_torchs_on_whole_matrices(ranks: Any, options: dict[str, Any], size: int) -> None:
    assert not any(ranks(size, differs, options, size))


@pytest.mark.parametrize("options", OPTIONS)
def test_on_whole_matrices_it_is_torchs(options: dict[str, Any]) -> None:
    for ours, theirs in zip(stepped(GatheredMuon, options, None), stepped(torch.optim.Muon, options, None)):
        assert torch.equal(ours, theirs)
