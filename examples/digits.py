"""What the other examples train: scikit-learn's handwritten digits, 1,797 images of 8 x 8, and a plain module."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainfleet import LossSum


class Digits(torch.utils.data.Dataset[dict[str, Any]]):
    """Every fifth image is held out."""

    def __init__(self, *, held_out: bool = False) -> None:
        images, labels = load_digits(return_X_y=True)
        chosen = torch.arange(len(labels)) % 5 == 0
        chosen = chosen if held_out else ~chosen
        self.images, self.labels = torch.tensor(images / 16).float()[chosen], torch.tensor(labels)[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": self.images[index], "target": self.labels[index]}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))


def digit_loss(output: Tensor, batch: dict[str, Tensor]) -> LossSum:
    """Summed over the images and weighed by their number, so that batches of any size count rightly."""
    return LossSum(cross_entropy(output, batch["target"], reduction="sum"), len(output))
