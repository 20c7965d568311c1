"""The loop of Lightning Fabric."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from lightning_fabric import Fabric
from loops.setting import CLIP_NORM, Step, mean_loss, optimizer_for
from torch import nn


class InFabric:
    def __init__(self, model: nn.Module, accumulation: int = 1) -> None:
        assert accumulation == 1
        size = dist.get_world_size()
        self.fabric = Fabric(accelerator="cpu", devices=size, strategy="ddp" if size > 1 else "auto")
        self.fabric.launch()
        self.model, self.optimizer = self.fabric.setup(model, optimizer_for(model))

    def run(self, steps: Sequence[Step]) -> list[float]:
        losses = []
        for (batch,) in steps:
            loss = mean_loss(self.model(batch["input"]), batch)
            self.fabric.backward(loss)
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=CLIP_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses
