"""Pixels does on the device what torchvision's ToTensor and Normalize do before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainfleet.data.pixels import Pixels
from trainfleet.errors import ConfigError, DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def expected(images: torch.Tensor) -> torch.Tensor:
    as_numbers = [torch.tensor(each).view(-1, 1, 1) for each in (MEAN, STD)]
    return torch.stack([(image.float() / 255 - as_numbers[0]) / as_numbers[1] for image in images])


def test_images_become_normalised_floats_and_the_rest_stays() -> None:
    labels, weight, flags = torch.arange(5), torch.ones(5), torch.ones(5, 2, dtype=torch.uint8)
    batch = {"input": IMAGES.clone(), "target": labels, "weight": weight, "flags": flags}
    prepared = Pixels(mean=MEAN, std=STD)(batch)
    assert torch.equal(prepared["input"], expected(IMAGES))
    assert prepared["target"] is labels and prepared["weight"] is weight and prepared["flags"] is flags
    assert batch["input"].dtype == torch.uint8, "the batch itself is left as it was"


def test_channels_may_come_last_or_be_none() -> None:
    last = Pixels(mean=MEAN, std=STD, channels="last")((IMAGES.movedim(1, -1), 0))[0]
    assert torch.equal(last, expected(IMAGES)) and last.is_contiguous()
    grey = Pixels(mean=0.5)(IMAGES[:, 0])
    assert grey.shape == (5, 1, 4, 6) and torch.equal(grey[:, 0], IMAGES[:, 0].float() / 255 - 0.5)


@pytest.mark.parametrize(
    ("args", "batch", "error", "message"),
    [
        ({}, {"input": IMAGES.float()}, DataError, "a batch has no uint8 images"),
        ({"mean": [0.5, 0.5]}, IMAGES, DataError, "3 channels, and mean or std 2 numbers"),
        ({"std": 0.0}, IMAGES, ConfigError, "must be more than 0"),
        ({"channels": "middle"}, IMAGES, ConfigError, "`first` or `last`"),
    ],
)
def test_what_cannot_be_is_said(args: dict[str, Any], batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Pixels(**args)(batch)
