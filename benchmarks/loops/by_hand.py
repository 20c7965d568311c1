"""The loops that everybody is compared with: plain PyTorch, as a careful person writes it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from loops.setting import CLIP_NORM, Step, mean_loss, optimizer_for
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel


class ByHand:
    """One process: no wrapper at all. Several: DistributedDataParallel."""

    def __init__(self, model: nn.Module, accumulation: int = 1) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.model = DistributedDataParallel(model) if several else model
        self.optimizer = optimizer_for(self.model)

    def run(self, steps: Sequence[Step]) -> list[float]:
        losses = []
        for micro_batches in steps:
            total = 0.0
            for i, batch in enumerate(micro_batches):
                with self.model.no_sync() if self.must_wait(i, micro_batches) else nullcontext():
                    loss = mean_loss(self.model(batch["input"]), batch) / len(micro_batches)
                    loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(total)
        return losses

    def must_wait(self, i: int, micro_batches: Step) -> bool:
        return isinstance(self.model, DistributedDataParallel) and i < len(micro_batches) - 1


class ByHandSharded:
    """FSDP2, block by block, as stage 1, 2 or 3 of ZeRO."""

    def __init__(self, model: nn.Module, accumulation: int = 1, stage: int = 2) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=stage == 3)
        self.model = fully_shard(model, mesh=mesh, reshard_after_forward=False)
        self.optimizer = optimizer_for(model)
        self.stage = stage

    def run(self, steps: Sequence[Step]) -> list[float]:
        losses = []
        for micro_batches in steps:
            total = 0.0
            for i, batch in enumerate(micro_batches):
                total += self.forward_backward(batch, len(micro_batches), is_last=i == len(micro_batches) - 1)
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(total)
        return losses

    def forward_backward(self, batch: dict[str, torch.Tensor], accumulation: int, *, is_last: bool) -> float:
        model = self.model
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(is_last or self.stage >= 2)
        model.set_reshard_after_backward(is_last or self.stage == 3)
        model.set_is_last_backward(is_last)
        loss = mean_loss(model(batch["input"]), batch) / accumulation
        loss.backward()
        return loss.item()
