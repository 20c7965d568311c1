"""Models, batches and streams that tests of serve/ ask for answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainfleet.data import LocalBatches
from trainfleet.loss import LossSum


class Points:
    """Samples of 6 numbers with one of `num_classes` labels, drawn once."""

    def __init__(self, count: int = 103, num_classes: int = 7) -> None:
        draw = np.random.default_rng(3)
        self.inputs = draw.normal(size=(count, 6)).astype(np.float32)
        self.labels = draw.integers(0, num_classes, count)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": self.inputs[index], "target": self.labels[index]}


def stream(points: Any = None, *, size: int = 8, **settings: Any) -> LocalBatches:
    return LocalBatches(Points() if points is None else points, size=size, shuffle=False, short="keep", **settings)


def linear(outputs: int = 7) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, outputs))


def summed(output: Tensor, batch: dict[str, Tensor]) -> LossSum:
    return LossSum(functional.cross_entropy(output, batch["target"], reduction="sum"), len(output))
