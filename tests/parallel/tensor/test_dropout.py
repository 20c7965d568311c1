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


def kept_bytes() -> int:
    """Of the memory that backward of a dropout on a half holds."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Mesh.from_env(Plan(tp=2)) as mesh, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):

        def forward(x: DTensor) -> Tensor:
            return F.dropout(x.redistribute(placements=[Shard(0)]), 0.5)

        on_pieces(forward, "dropout", mesh.torch["tp"])(torch.ones(8, 32, requires_grad=True))
    return sum(kept.values())


def test_of_the_mask_a_rank_keeps_its_part_only(ranks: RankPools) -> None:
    assert ranks(2, kept_bytes) == [4 * 8 * 32 // 2] * 2


def test_nothing_is_dropped_outside_training(ranks: RankPools) -> None:
    for found in ranks(2, dropped, Shard(0), torch.float32, False):
        assert all(torch.equal(expected, pieces) for expected, pieces in found)
