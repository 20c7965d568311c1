"""The engine takes the steps of torch's own DDP and FSDP2, to the bit."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from models import MODELS
from oracle import whole
from rank_pool import RankPools
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize
from trainfleet.plan import Plan

pytestmark = pytest.mark.cluster

TRANSFORMER = MODELS["transformer"]


def mean_loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch["target"].flatten())


def bits(model: nn.Module) -> list[Tensor]:
    return [whole(parameter) for parameter in model.parameters()]


def torch_loop(model: nn.Module, mesh: Mesh, steps: int, accumulation: int, *, scatter: bool = False) -> list[Tensor]:
    """The loop that torch's own documentation shows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ddp = isinstance(model, DistributedDataParallel)
    for step in range(steps):
        for i in range(accumulation):
            batch = TRANSFORMER.micro_batch(0, (step * accumulation + i) * mesh.world_size + mesh.rank)
            last = i == accumulation - 1
            if not ddp:
                model.set_requires_gradient_sync(last or scatter)
            with model.no_sync() if ddp and not last else nullcontext():
                loss = mean_loss(model(batch["input"]), batch) / accumulation
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return bits(model)


def engine_loop(mesh: Mesh, plan: Plan, steps: int, accumulation: int) -> list[Tensor]:
    model = parallelize(TRANSFORMER.build(0), mesh, plan)
    engine = NativeEngine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), mean_loss, seed=None)
    for step in range(steps):
        first = step * accumulation * mesh.world_size + mesh.rank
        engine.forward_backward([TRANSFORMER.micro_batch(0, first + i * mesh.world_size) for i in range(accumulation)])
        engine.step()
    return bits(model)


def equal_steps() -> dict[str, bool]:
    found = {}
    with Mesh.from_env(Plan()) as mesh:
        for steps, accumulation in ((200, 1), (30, 3)):
            theirs = torch_loop(DistributedDataParallel(TRANSFORMER.build(0)), mesh, steps, accumulation)
            ours = engine_loop(mesh, Plan(), steps, accumulation)
            found[f"ddp x{accumulation}"] = all(map(torch.equal, ours, theirs))
    with Mesh.from_env(Plan(zero=1)) as mesh:
        for zero in (1, 2, 3):
            model = TRANSFORMER.build(0)
            for module in (*model.blocks, model):
                fully_shard(module, reshard_after_forward=zero == 3 and module is not model)
            theirs = torch_loop(model, mesh, 15, 3, scatter=zero >= 2)
            found[f"zero {zero}"] = all(map(torch.equal, engine_loop(mesh, Plan(zero=zero), 15, 3), theirs))
    return found


def test_steps_equal_those_of_ddp_and_fsdp2_to_the_bit(ranks: RankPools) -> None:
    for found in ranks(2, equal_steps):
        assert found == {"ddp x1": True, "ddp x3": True, "zero 1": True, "zero 2": True, "zero 3": True}
