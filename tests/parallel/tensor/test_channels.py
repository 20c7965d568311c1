"""Norms, pools, resampling and padding of channels in pieces give what the whole gives, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from piecewise import differences
from rank_pool import RankPools
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

NUMBERS = torch.linspace(-1, 1, 8)
MEAN, VARIANCE = NUMBERS.clone(), NUMBERS + 2


def batch_norm(x: Tensor, training: bool) -> Tensor:
    mean, variance = MEAN.clone(), VARIANCE.clone()
    y = F.batch_norm(x, mean, variance, NUMBERS + 2, NUMBERS, training, 0.3)
    return y + (mean + 2 * variance)[:, None, None]  # what the statistics have become


def in_place(x: Tensor) -> Tensor:
    pooled = F.max_pool2d(x, 1)
    F.relu(pooled, inplace=True)
    normed = F.batch_norm(x, None, None, training=True)
    F.hardswish(normed, inplace=True)
    return F.relu6(pooled * 2, inplace=True) + F.hardtanh(normed, -2, 2, inplace=True) + pooled + normed


def by_length(x: Tensor) -> Tensor:
    line = x.flatten(2)
    pools = F.max_pool1d(line, 2), F.avg_pool1d(line, 2), F.adaptive_avg_pool1d(line, 12)
    return sum(pools) + F.adaptive_max_pool1d(line, 12)


def by_volume(x: Tensor) -> Tensor:
    cube = x.unsqueeze(-1)
    pools = F.max_pool3d(cube, (2, 2, 1)), F.avg_pool3d(cube, (2, 2, 1)), F.adaptive_avg_pool3d(cube, (3, 2, 1))
    return sum(pools) + F.adaptive_max_pool3d(cube, (3, 2, 1))


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "statistics of the batch": lambda x: batch_norm(x, True),
    "running statistics": lambda x: batch_norm(x, False),
    "no statistics": lambda x: F.batch_norm(x, None, None, training=True) * NUMBERS[:, None, None],
    "groups": lambda x: F.group_norm(x, 4, NUMBERS + 2, NUMBERS) + F.group_norm(x, 2) + F.group_norm(x, 1, NUMBERS),
    "instances": lambda x: F.instance_norm(x, None, None, NUMBERS, NUMBERS) + F.instance_norm(x, MEAN, VARIANCE),
    "pools": lambda x: F.max_pool2d(x, 2, 2, 1)[..., 1:, 1:] + F.avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, (3, 2)),
    "more pools": lambda x: F.adaptive_max_pool2d(x, (3, 2)) * F.max_pool2d(x, 2, return_indices=True)[1],
    "of one dimension": by_length,
    "of three": by_volume,
    "resampled": lambda x: F.interpolate(x, scale_factor=2) + F.interpolate(x, (12, 8), mode="bilinear"),
    "padded": lambda x: F.pad(x, (1, 0, 2, 1)) + F.pad(x, (0, 1, 1, 2), mode="reflect") + F.pad(x, (1, 0, 3, 0, 0, 0)),
    "channels padded": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "activations": lambda x: F.relu6(3 * x) + F.hardtanh(x) + F.hardswish(x) + F.hardsigmoid(x),
    "in place": in_place,
    "dropout of channels": lambda x: F.dropout2d(x, 0.4) + F.dropout(x, 0.3),
}
PLACEMENTS = (Shard(1), Shard(0), Shard(2), Replicate())


def wrong(placements: tuple[Any, ...]) -> list[str]:
    return differences(CALLS, placements, (4, 8, 6, 4))


def test_channels_in_pieces_give_what_the_whole_gives(ranks: RankPools) -> None:
    assert ranks(2, wrong, PLACEMENTS[:1]) == [[], []]


@pytest.mark.matrix
def test_all_pieces_give_what_the_whole_gives(ranks: RankPools) -> None:
    assert ranks(2, wrong, PLACEMENTS) == [[], []]
