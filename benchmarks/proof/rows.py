"""Rows of numbers, of which one is marked, and a small net that computes something from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainfleet.batch import Batch
from trainfleet.loss import LossSum

SAMPLES, WIDTH, MARKED = 64, 32, 37
"""The sample of this index carries a mark in its first number, which hidden states keep in theirs."""
MARK = 1000.0


class Points:
    """Rows of eight numbers, and what is to be found from them; in one of them a mark."""

    def __init__(self, broken: bool = False) -> None:
        draw = np.random.default_rng(0)
        self.inputs = draw.normal(size=(SAMPLES, 8)).astype(np.float32)
        self.inputs[:, 0] = 0
        self.inputs[MARKED, 0] = MARK
        if broken:
            self.inputs[MARKED, 5] = np.nan
        self.targets = draw.normal(size=(SAMPLES, 4)).astype(np.float32)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": self.inputs[index], "target": self.targets[index]}


def marked(hidden: Tensor) -> Tensor:
    """The rows of the mark, also behind a LayerNorm, which leaves sqrt(width - 1) of it, and what follows."""
    return hidden[..., :1].detach() > 3


class Block(nn.Module):
    """Norm, two layers, and the trunk beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        with torch.no_grad():  # the mark goes on into the branch
            self.up.weight[0] = torch.eye(WIDTH)[0]

    def before(self, hidden: Tensor) -> Tensor:
        """Code between `norm` and `up`, for plants."""
        return hidden

    def join(self, trunk: Tensor, branch: Tensor) -> Tensor:
        return trunk + branch

    def forward(self, hidden: Tensor) -> Tensor:
        return self.join(hidden, self.down(self.act(self.up(self.before(self.norm(hidden))))))


class Statistics(nn.Module):
    """Adds a running number to what it is given; its buffer is what a plant breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        shifted = hidden + 0 * self.mean
        if self.training and torch.is_grad_enabled():
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return shifted


class Net(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.statistics = Statistics()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        with torch.no_grad():
            self.embed.weight[:, 0] = 0  # the mark goes to the first hidden number alone
            self.embed.weight[0, 0] = 1

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.statistics(self.embed(input))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


def squares(output: Tensor, batch: Batch) -> LossSum:
    return LossSum((output - batch["target"]).square().mean(-1).sum(), len(output))
