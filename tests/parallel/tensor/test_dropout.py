"""Dropout of pieces is dropout of the whole, to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rank_pool import RankPools
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from trainfleet.mesh import Mesh
from trainfleet.parallel.tensor.region import on_pieces
from trainfleet.plan import Plan


def dropped(placement: Placement, dtype: torch.dtype, training: bool) -> list[tuple[Tensor, Tensor]]:
    """(as one process, of pieces) of outputs and gradients; the input lies as a transposed one does."""
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(0, 1)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(5)
    expected = F.dropout(one, 0.3, training) * F.dropout(one, 0.1, training)
    expected.sum().backward()

    def forward(x: DTensor) -> Tensor:
        x = x.redistribute(placements=[placement])
        return F.dropout(x, 0.3, training) * F.dropout(x, 0.1, training)

    with Mesh.from_env(Plan(tp=2)) as mesh:
        torch.manual_seed(5)
        found = on_pieces(forward, "dropout", mesh.torch["tp"])(other)
        found.sum().backward()
    return [(expected.detach(), found.detach()), (one.grad, other.grad)]


@pytest.mark.parametrize("placement", [Shard(0), Shard(2), Replicate()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_are_those_of_the_whole_tensor(ranks: RankPools, placement: Placement, dtype: torch.dtype) -> None:
    for found in ranks(2, dropped, placement, dtype, True):
        for expected, pieces in found:
            assert torch.equal(expected, pieces)
            assert (expected == 0).any()


def test_nothing_is_dropped_outside_training(ranks: RankPools) -> None:
    for found in ranks(2, dropped, Shard(0), torch.float32, False):
        assert all(torch.equal(expected, pieces) for expected, pieces in found)
