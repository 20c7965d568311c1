"""Handwritten digits: 1,797 images of 8 x 8 of scikit-learn as uint8, and a small convolutional network."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from torch import Tensor, nn

CLASSES = [str(digit) for digit in range(10)]


class Digits:
    """{"input": uint8 [1, 8, 8], "target": 0 to 9}; every fifth image is held out."""

    def __init__(self, *, held_out: bool = False) -> None:
        pixels, labels = load_digits(return_X_y=True)
        chosen = (np.arange(len(labels)) % 5 == 0) == held_out
        # They have 17 shades, 0 to 16.
        self._images = (pixels[chosen] * 255 / 16).round().astype(np.uint8).reshape(-1, 1, 8, 8)
        self._labels = labels[chosen].astype(np.int64)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": self._images[index], "target": self._labels[index]}


class SmallNet(nn.Module):
    """float32 [N, 1, 8, 8] to logits [N, 10]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * width, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits
