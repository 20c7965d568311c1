"""The FLOPs of a model are those that PaLM's formula gives, whatever would compute them, and cost no memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.loss import LossSum
from trainfleet.parallel.flops import ModelFlops

sys.path.append(str(Path(__file__).parents[2] / "recipes"))

from gpt import GPT, loss_fn


def windows(samples: int, length: int) -> dict[str, Tensor]:
    tokens = torch.zeros(samples, length, dtype=torch.int64)
    return {"input": tokens, "target": tokens}


def test_those_of_the_recipes_gpt_are_6_N_and_12_L_H_Q_T_a_token() -> None:
    width, depth, heads, length, samples = 160, 3, 2, 256, 4  # recipes/gpt_stdlib.yaml
    model = GPT(width, depth, heads)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith("embeddings"))
    a_token = 6 * matrices + 12 * depth * heads * (width // heads) * length
    counted = ModelFlops(model, loss_fn)
    assert counted.of(windows(samples, length)) == a_token * samples * length
    assert counted.of(windows(2 * samples, length)) == 2 * a_token * samples * length
    assert all(parameter.grad is None for parameter in model.parameters())


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, 16, bias=False).requires_grad_(False)
        self.head = nn.Linear(16, 4, bias=False)

    def forward(self, pixels: Tensor) -> Any:
        return self.head(torch.relu(self.frozen(pixels)))


def test_what_is_frozen_needs_no_backward_and_prepare_comes_first() -> None:
    def prepare(batch: list[Tensor]) -> list[Tensor]:
        return [batch[0].float() / 255, batch[1]]

    def loss(output: Tensor, batch: Any) -> LossSum:
        return LossSum(nn.functional.cross_entropy(output, batch[1], reduction="sum"), float(len(output)))

    batch = [torch.zeros(5, 8, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64)]
    counted = ModelFlops(Recomputed(), loss, prepare).of(batch)
    assert counted == 2 * 5 * (8 * 16 + 2 * 16 * 4)  # forward of both; of the head the gradient of its weight too


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if x.sum().item() > 0 else x


def test_a_forward_that_asks_for_numbers_says_so() -> None:
    with pytest.raises(PlanError, match=r"monitor\.flops_per_token"):
        ModelFlops(Looks(), lambda output, batch: output.sum()).of(torch.zeros(2, 3))
    with pytest.raises(PlanError, match="do not know their shape"):
        ModelFlops(nn.LazyLinear(3), lambda output, batch: output.sum())
