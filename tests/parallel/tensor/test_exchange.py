"""What is exchanged comes as it should be placed, forward and backward, however it lay in memory."""

from __future__ import annotations

import pytest
import torch
from rank_pool import RankPools
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from trainfleet.mesh import Mesh
from trainfleet.parallel.tensor.exchange import gathered, local_of, placed, whole_of
from trainfleet.plan import Plan


def there_and_back(begin: Placement, end: Placement) -> bool:
    """Of a transposed tensor, whose backward takes views of what was exchanged."""
    with Mesh.from_env(Plan(tp=2)) as mesh:
        whole = torch.arange(96.0).view(4, 4, 6).requires_grad_()
        array = DTensor.from_local(whole, mesh.torch["tp"], [Replicate()], run_check=False)
        other = placed(array.view(4, 4, 2, 3).transpose(1, 2), begin)
        result = placed(other, end)
        assert result.placements == (end,)
        (whole_of(result) * torch.arange(96.0).view(4, 2, 4, 3)).sum().backward()
        factors = torch.arange(96.0).view(4, 2, 4, 3).transpose(1, 2).reshape(4, 4, 6)
        same = torch.equal(whole_of(result), whole.view(4, 4, 2, 3).transpose(1, 2))
        return bool(same and torch.equal(whole.grad, factors))


@pytest.mark.parametrize("end", [Shard(1), Shard(2), Replicate()], ids=str)
@pytest.mark.parametrize("begin", [Shard(1), Shard(0), Replicate()], ids=str)
def test_an_exchange_and_its_gradient_are_those_of_the_whole(
    ranks: RankPools, begin: Placement, end: Placement
) -> None:
    assert ranks(2, there_and_back, begin, end) == [True, True]


def gathered_and_back(gradient: Placement) -> list[list[float]]:
    """The whole that was gathered, and of a gradient that lies so this rank's piece."""
    with Mesh.from_env(Plan(tp=2)) as mesh:
        local = torch.tensor([[1.0, 2.0]]).mul(mesh.rank + 1).requires_grad_()
        array = DTensor.from_local(local, mesh.torch["tp"], [Shard(1)], run_check=False)
        whole = gathered(array)
        assert whole.placements == (Replicate(),)
        part = torch.full((1, 4), 3.0) if gradient.is_replicate() else torch.arange(4.0)[None] * (mesh.rank + 1)
        whole.backward(DTensor.from_local(part, mesh.torch["tp"], [gradient], run_check=False))
        assert local.grad is not None
        return [whole.to_local()[0].tolist(), local.grad[0].tolist()]


def test_of_a_gradient_in_parts_each_rank_gets_the_sum_of_its_piece(ranks: RankPools) -> None:
    whole = [1.0, 2.0, 2.0, 4.0]
    assert ranks(2, gathered_and_back, Partial()) == [[whole, [0.0, 3.0]], [whole, [6.0, 9.0]]]
    assert ranks(2, gathered_and_back, Replicate()) == [[whole, [3.0, 3.0]]] * 2


def parts_of_a_gradient() -> list[float]:
    with Mesh.from_env(Plan(tp=2)) as mesh:
        whole = torch.ones(3, requires_grad=True)
        array = DTensor.from_local(whole, mesh.torch["tp"], [Replicate()], run_check=False)
        (local_of(array, Partial()) * (mesh.rank + 1)).sum().backward()
        return whole.grad.tolist()


def test_parts_of_a_gradient_are_summed(ranks: RankPools) -> None:
    assert ranks(2, parts_of_a_gradient) == [[3.0] * 3] * 2
