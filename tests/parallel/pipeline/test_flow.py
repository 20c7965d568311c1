"""Tests of micro-batches on their way: what a stage hands on besides tensors."""

from __future__ import annotations

from typing import Any

import torch
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.mesh import Mesh
from trainfleet.parallel import make_engine, parallelize
from trainfleet.plan import Plan


class Draws(nn.Module):
    """Random numbers in every stage, and a branch whose second half gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        unused = self.a(x)
        kept = self.drop(self.b(x) + torch.rand(4))
        return self.c(kept.mul_(2)) + torch.rand(4) + unused.detach()


def stepped(plan: Plan) -> list[Any]:
    torch.set_num_threads(1)
    with Mesh.from_env(plan) as mesh:
        torch.manual_seed(0)
        x = torch.randn(3, 4)
        model = parallelize(Draws(), mesh, plan, example=x)
        engine = make_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda y, _: y.square().sum())
        loss = engine.forward_backward([x, 2 * x, x[:2]])
        return [loss.total, {name: p.grad for name, p in model.named_parameters()}]


def test_stages_go_on_drawing_and_what_nobody_used_has_no_gradient(ranks: RankPools) -> None:
    ((loss, gradients),) = ranks(1, stepped, Plan())
    found = ranks(2, stepped, Plan(pp=2, stages=("c",)))
    assert [each[0] for each in found] == [loss, loss]
    together = {**found[0][1], **found[1][1]}
    assert sorted(together) == sorted(gradients)
    for name, gradient in gradients.items():
        assert (gradient is None) == (together[name] is None) == name.startswith("a.")
        assert gradient is None or torch.equal(gradient, together[name])
