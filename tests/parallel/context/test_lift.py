"""What is plain becomes a copy on all ranks and comes back; the mean of the ranks' gradients is its gradient."""

from __future__ import annotations

from typing import Any

import torch
from rank_pool import RankPools
from torch.distributed.tensor import DTensor, Replicate, Shard

from trainfleet.mesh import Mesh
from trainfleet.parallel.context.lift import lifted, lowered, plain_of
from trainfleet.parallel.tensor.exchange import placed, whole_of
from trainfleet.plan import Plan


def gradients() -> list[Any]:
    """Of a parameter that met pieces, and of one that met copies; [0, 1, 2, 3] is the right one for both."""
    with Mesh.from_env(Plan(cp=2)) as mesh:
        over = mesh.torch["cp"]
        found = []
        for placement in (Shard(0), Replicate()):
            parameter = torch.ones(4, requires_grad=True)
            x = placed(lifted(torch.arange(4.0), over), placement)
            whole_of(placed((lifted(parameter, over) * x).sum(), Replicate())).backward()
            torch.distributed.all_reduce(parameter.grad)
            found.append((parameter.grad / 2).tolist())
        x = torch.arange(4.0, requires_grad=True)
        plain = plain_of(placed(lifted(x, over), Shard(0)))
        (plain * (1 + 2 * mesh.rank)).sum().backward()  # ranks do different things with it: 1 and 3 times
        torch.distributed.all_reduce(x.grad)
        found.append((x.grad / 2).tolist())
        return found


def test_the_mean_of_the_ranks_gradients_is_right_for_what_is_plain(ranks: RankPools) -> None:
    for found in ranks(2, gradients):
        assert found == [[0, 1, 2, 3], [0, 1, 2, 3], [2, 2, 2, 2]]


def between_meshes() -> list[Any]:
    with Mesh.from_env(Plan(cp=2, tp=2)) as mesh:
        over, both, tensor = mesh.torch["cp"], mesh.torch["cp", "tp"], mesh.torch["tp"]
        x = torch.arange(8.0).view(4, 2).requires_grad_()
        pieces = placed(lifted(x, over), Shard(0))
        weight = DTensor.from_local(torch.ones(1, 2) * (mesh["tp"].rank + 1), tensor, [Shard(0)]).requires_grad_()
        product = lifted(pieces, both) @ lifted(weight, both).T
        result = lowered(product, over)
        whole_of(placed(result.sum(), Replicate())).backward()
        torch.distributed.all_reduce(x.grad)
        local = weight.grad.to_local().clone()
        torch.distributed.all_reduce(local, group=mesh.torch.get_group("cp"))
        return [
            [str(p) for p in product.placements] == [str(Shard(0)), str(Shard(1))],
            whole_of(result).tolist(),
            (x.grad / 4).tolist(),
            weight.grad.placements == weight.placements,
            (local / 2).tolist(),
        ]


def test_pieces_of_sequences_meet_pieces_of_layers(ranks: RankPools) -> None:
    x, weight = torch.arange(8.0).view(4, 2), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    for rank, found in enumerate(ranks(4, between_meshes)):
        assert found[0]
        assert found[1] == (x @ weight.T).tolist()
        assert found[2] == weight.sum(0).expand(4, 2).tolist()
        assert found[3]
        assert found[4] == [x.sum(0).tolist()], rank
