"""What every training loop of a comparison has in common: model, batches, loss, optimizer, clipping."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "recipes"))

from gpt import GPT

Batch = dict[str, Tensor]
Step = Sequence[Batch]
"""The micro-batches of one optimizer step, on this rank."""
CLIP_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model and its batches."""

    width: int
    depth: int
    samples: int
    """In a micro-batch."""
    length: int
    """Bytes of a sample."""
    accumulation: int = 1
    heads: int = 2

    def build_model(self) -> nn.Module:
        """The same numbers each time, on every rank."""
        torch.manual_seed(0)
        return GPT(self.width, self.depth, self.heads)

    def steps(self, count: int, rank: int) -> list[Step]:
        """`count` steps of batches, other ones on each rank, from a text that every Python brings."""
        text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
        draw = torch.Generator().manual_seed(1000 + rank)
        window = self.length + 1

        def micro_batch() -> Batch:
            starts = torch.randint(len(text) - window, (self.samples,), generator=draw).tolist()
            rows = torch.stack([text[start : start + window] for start in starts])
            return {"input": rows[:, :-1].contiguous(), "target": rows[:, 1:].contiguous()}

        return [[micro_batch() for _ in range(self.accumulation)] for _ in range(count)]


def mean_loss(output: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch["target"].flatten())


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


class Loop(Protocol):
    """A training loop that can be stopped and continued between steps."""

    def run(self, steps: Sequence[Step]) -> list[float]:
        """Take these steps; the loss of each, of this rank's batches alone."""
        ...


Maker = Callable[[nn.Module, int], Loop]
"""(model, accumulation) -> Loop."""


def mean(values: Sequence[Any]) -> float:
    return sum(float(value) for value in values) / len(values)
