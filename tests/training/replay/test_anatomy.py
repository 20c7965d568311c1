"""What a step computed, by module, is that of all ranks together, and pieces count once."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from trainfleet.comm.threads import run_ranks
from trainfleet.training.inspection.watch import Watch
from trainfleet.training.replay.anatomy import COLUMNS, anatomy_of, before_update, gradients_now, table


def anatomy(group: Any) -> list[Any]:
    """Of a copy of one model on each rank, with other inputs on each."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    watch = Watch(model, tallies=True)
    with watch:
        model(torch.tensor([[3.0 + group.rank, -1.0]])).sum().backward()
    before, gradients = before_update(model), gradients_now(model)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    return anatomy_of(model, watch, before, gradients, group)


def test_ranks_are_joined_and_copies_count_once() -> None:
    first, second = run_ranks(2, anatomy)
    assert [part.module for part in first] == ["0", "1", ""] == [part.module for part in second]
    linear, relu, whole = first
    assert (linear.outputs.largest, linear.outputs.mean, linear.outputs.count) == (4.0, 1.25, 4)
    assert relu.outputs.share_of_zeros == 0.5 and relu.gradients.mean == 1.0
    assert linear.parameters == pytest.approx(math.sqrt(2)) and linear.update_ratio == pytest.approx(0.1)
    assert relu.update_ratio is None and whole.kind == "Sequential"


def test_a_person_reads_a_line_a_module_and_a_program_numbers() -> None:
    parts = run_ranks(1, anatomy)[0]
    lines = table(parts)
    assert lines[0].split("  ")[0] == COLUMNS[0] and [line.split()[0] for line in lines[1:]] == ["0", "1", "the"]
    assert "50.0%" in lines[2] and lines[1].endswith("0.1")
    told = parts[0].to_plain()
    assert told["outputs"] == {"elements": 2, "not_finite": 0, "largest": 3.0, "mean": 1.0, "zeros": 0.0}
    assert parts[1].to_plain()["update_ratio"] is None
