"""Recomputing blocks changes the memory and nothing else."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import parallelize
from trainfleet.parallel.blocks import find_blocks
from trainfleet.parallel.recompute import recompute
from trainfleet.plan import Plan


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, 4 * width)
        self.back = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x: Tensor, *, gain: Tensor) -> Tensor:
        self.calls += 1
        return x + gain * self.dropout(self.back(torch.relu(self.linear(self.norm(x)))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, gain=torch.tensor(0.5))
        return x


def model_of(*, recomputing: bool) -> Model:
    torch.manual_seed(0)
    model = Model()
    if recomputing:
        recompute(find_blocks(model))
    return model


def saved_bytes(run: Any) -> int:
    """Bytes of distinct memory that `run` keeps for backward."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(held.values())


def test_gradients_dropout_and_batch_statistics_are_the_same() -> None:
    found = []
    for recomputing in (False, True):
        model = model_of(recomputing=recomputing)
        torch.manual_seed(1)
        for _ in range(2):
            model(torch.randn(6, 8)).square().sum().backward()
        found.append([*(p.grad for p in model.parameters()), *model.buffers(), torch.rand(1)])
    assert all(map(torch.equal, *found))
    assert model.blocks[0].norm.num_batches_tracked == 2 and model.blocks[0].calls == 4


def test_activations_of_a_block_are_forgotten() -> None:
    x = torch.randn(512, 8)
    kept, forgotten = (saved_bytes(functools.partial(model_of(recomputing=r), x)) for r in (False, True))
    # Each block keeps its input, and a scalar gain, of what was four widths and more.
    assert forgotten < kept / 5 and forgotten < 4 * (x.nbytes + 4096)


def test_without_gradients_nothing_is_recomputed() -> None:
    model = model_of(recomputing=True).eval()
    with torch.no_grad():
        model(torch.randn(6, 8))
    assert [block.calls for block in model.blocks] == [1] * 4


def test_a_block_in_a_recomputed_block_counts_once() -> None:
    found = []
    for recomputing in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()) for _ in range(2)))
        outer = nn.Sequential(model, nn.Linear(3, 3))
        if recomputing:
            recompute([model, *model])
        outer(torch.randn(5, 3)).sum().backward()
        found.append([*(p.grad for p in outer.parameters()), *outer.buffers()])
    assert all(map(torch.equal, *found))


def spread(plan: Plan) -> list[Tensor]:
    with Mesh.from_env(plan) as mesh:
        model = parallelize(model_of(recomputing=False), mesh, plan)
        torch.manual_seed(1)
        loss = model(torch.randn(6, 8)).square().sum()
        loss.backward()
        return [loss.detach(), *(buffer.clone() for buffer in model.buffers())]


def test_under_sharding_and_low_precision_too(ranks: RankPools) -> None:
    for zero in (0, 3):
        for precision in ("fp32", "bf16"):
            plain, again = (
                ranks(2, spread, Plan(zero=zero, precision=precision, recompute=how)) for how in ("none", "blocks")
            )
            for a, b in zip(plain, again):
                assert all(map(torch.equal, a, b))


def without_blocks() -> None:
    with Mesh.from_env(Plan()) as mesh:
        parallelize(nn.Linear(2, 2), mesh, Plan(recompute="blocks"))


def test_a_model_without_blocks_is_refused(ranks: RankPools) -> None:
    with pytest.raises(PlanError, match=r"Linear has no repeated modules. Name them in plan.blocks"):
        ranks(1, without_blocks)
