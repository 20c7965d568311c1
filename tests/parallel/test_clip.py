"""The norm over the mesh is the norm of the whole, and clipping scales by it."""

from __future__ import annotations

from typing import Any

import torch
from oracle import whole
from rank_pool import RankPools
from torch import nn
from torch.distributed.fsdp import fully_shard

from trainfleet.mesh import Mesh
from trainfleet.parallel.clip import gradient_norm, local_gradients, scale_gradients_
from trainfleet.plan import Plan


class Parts(nn.Module):
    """Rows that do not divide, fewer rows than ranks, a scalar, one without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 1)
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * self.b(self.a(x))


def norms() -> list[Any]:
    plain = Parts()
    x = torch.randn(4, 5)
    plain(x).square().sum().backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    plan = Plan(zero=2)
    with Mesh.from_env(plan) as mesh:
        model = Parts()
        fully_shard(model, mesh=mesh.torch["dp_shard"], ignored_params={model.gain})
        model(x).square().sum().backward()
        parameters = list(model.parameters())
        model.unused.grad = None
        norm = gradient_norm(parameters, mesh["dp_shard"])
        before = [whole(p.grad) for p in parameters if p.grad is not None]
        scale_gradients_(parameters, 0.25)
        after = [whole(p.grad) for p in parameters if p.grad is not None]
        model.b.bias.grad.to_local().fill_(float("inf"))  # on the one rank that has it
        infinite = gradient_norm(parameters, mesh["dp_shard"])
        model.gain.grad = torch.tensor(float("nan"))
        odd = gradient_norm(parameters, mesh["dp_shard"])
        nothing = gradient_norm([], mesh["dp_shard"])
    return [
        torch.isclose(norm, expected.double(), rtol=1e-6).item() and norm.dtype == torch.float64,
        all(torch.equal(b * 0.25, a) for b, a in zip(before, after)),
        infinite.item(),
        odd.isnan().item(),
        nothing.item(),
    ]


def test_the_norm_is_that_of_the_whole_on_every_rank(ranks: RankPools) -> None:
    for size in (1, 2, 4):
        for found in ranks(size, norms):
            assert found == [True, True, float("inf"), True, 0.0]


def alone() -> list[Any]:
    with Mesh.from_env(Plan()) as mesh:
        group = mesh["dp_shard"]
        wave = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        wave.grad = torch.tensor([3.0 + 4.0j, 0.0])
        fine = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        fine.grad = torch.tensor([12.0], dtype=torch.float64)
        many = nn.Parameter(torch.zeros(3_000_000))
        many.grad = torch.full((3_000_000,), 1e-3)
        return [
            gradient_norm([wave, fine], group).item(),
            gradient_norm([many], group).item() / (1e-3 * 3_000_000**0.5),
        ]


def test_complex_and_mixed_and_many_gradients_count_rightly(ranks: RankPools) -> None:
    joined, many = ranks(1, alone)[0]
    assert abs(joined - 13.0) < 1e-6 and abs(many - 1) < 1e-5


def test_gradients_share_their_memory_and_a_factor_of_one_costs_nothing() -> None:
    parameter, without = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    (gradient,) = local_gradients([parameter, without])
    gradient.mul_(3)
    version = parameter.grad._version
    scale_gradients_([parameter], 1.0)
    assert parameter.grad._version == version and parameter.grad.tolist() == [3.0, 3.0]
    scale_gradients_([without], 0.5)
    assert without.grad is None
