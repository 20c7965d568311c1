"""A rank's piece is what torch itself would give it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from trainfleet.parallel.cut import piece_like

SHAPES = [(8, 3), (7, 3), (1, 5), (3,), (5, 4, 2)]


def unlike(shape: tuple[int, ...], degrees: tuple[int, ...], placements: list[Any]) -> bool:
    mesh = init_device_mesh("cpu", degrees)
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    pieces: DTensor = distribute_tensor(whole, mesh, placements)
    return not torch.equal(piece_like(whole, pieces), pieces.to_local())


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_are_torchs_even_where_rows_do_not_divide(ranks: Any, shape: tuple[int, ...]) -> None:
    assert not any(ranks(2, unlike, shape, (2,), [Shard(0)]))
    assert not any(ranks(2, unlike, shape, (2,), [Replicate()]))
    assert not any(ranks(4, unlike, shape, (4,), [Shard(len(shape) - 1)]))
    assert not any(ranks(4, unlike, shape, (2, 2), [Replicate(), Shard(0)]))


def test_a_plain_tensor_is_kept_whole() -> None:
    whole = torch.ones(3)
    assert piece_like(whole, torch.zeros(3)) is whole
