"""Ranks whose batches use different parameters compute what one process computes, whole and sharded alike."""

from __future__ import annotations

import pytest
from rank_pool import RankPools


def difference(zero: int, accumulation: int) -> float:
    """Between two ranks, of which each uses another layer (one of them a scalar too), and one process; after 3 steps.

    One layer is used by nobody: the optimizer, which decays, must leave it alone.
    """
    import torch
    from torch import nn
    from torch.distributed.tensor import DTensor

    from trainfleet import Mesh, NativeEngine, Plan, parallelize

    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.even, self.odd, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.odd(x) * self.scale if x[0, 0] > 0 else self.even(x)

    def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)

    plan = Plan(zero=zero)
    batches = [torch.full((2, 4), float(i % 2)) for i in range(2 * accumulation)]
    with Mesh.from_env(plan, device="cpu") as mesh:
        model, plain = parallelize(Choosing(), mesh, plan), Choosing()
        optimizer = optimizer_for(plain)
        engine = NativeEngine(model, optimizer_for(model), lambda output, batch: output.mean())
        for _ in range(3):
            engine.forward_backward(batches[mesh.rank :: 2])
            engine.step()
            torch.stack([plain(batch).mean() for batch in batches]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        return max(float((p - q).detach().abs().max()) for p, q in zip(whole, plain.parameters()))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_ranks_may_use_different_parameters(ranks: RankPools, zero: int, accumulation: int) -> None:
    assert max(ranks(2, difference, zero, accumulation)) < 1e-6
