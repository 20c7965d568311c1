"""Parameters and buffers that a step began with, and that were not finite."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from trainfleet.mesh import Mesh
from trainfleet.plan import Plan
from trainfleet.training.inspection.held import held_by


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("mean", torch.zeros(2))


def test_tied_ones_are_found_by_each_of_their_names_and_masks_are_none() -> None:
    model = Tied()
    with Mesh.from_env(Plan(), device="cpu") as mesh:
        assert held_by(model, mesh) == []
        with torch.no_grad():
            model.embed.weight[1, 1] = math.nan
            model.mean[0] = math.inf
        parameter, buffer = held_by(model, mesh)
    assert (parameter.kind, parameter.name, parameter.aliases) == (
        "parameter",
        "embed.weight",
        ("embed.weight", "head.weight"),
    )
    assert parameter.is_used_by(["head"]) and parameter.is_used_by([""]) and not parameter.is_used_by(["norm"])
    assert "held NaN already" in parameter.what(1) and parameter.what(3).endswith("so were 2 more")
    assert (buffer.kind, buffer.name, buffer.module) == ("buffer", "mean", "") and buffer.values.num_plus_inf == 1
