"""Dropout on pieces: the mask that one process would draw, and of it this rank's part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from trainfleet.parallel.cut import piece_like


def split_dropout(
    mesh: DeviceMesh,
    whole: Callable[..., Any],
    input: DTensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    train: bool | None = None,
) -> Any:
    """Dropout of `input`, to the bit that of one process whose generator stands where this rank's does.

    torch draws the mask from the shape of the whole, so every rank draws all of it: ones that went through dropout.
    """
    training = training if train is None else train
    if p == 0.0 or not training:
        return input
    with torch.no_grad():
        ones = torch.empty_strided(input.shape, input.stride(), dtype=input.dtype, device=input.device).fill_(1)
        drawn = torch.nn.functional.dropout(ones, p)
        mask = piece_like(drawn, input)
        if mask.numel() < drawn.numel():
            mask = mask.clone()  # backward keeps it, and with it would keep all of the whole
    if all(isinstance(placement, Replicate) for placement in input.placements):
        mask = mask.view_as(input.to_local())
    kept = DTensor.from_local(
        mask, input.device_mesh, input.placements, run_check=False, shape=input.shape, stride=input.stride()
    )
    return input.mul_(kept) if inplace else input * kept
