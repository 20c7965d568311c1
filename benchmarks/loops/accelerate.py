"""The loop of Hugging Face Accelerate."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator
from loops.setting import CLIP_NORM, Step, mean_loss, optimizer_for
from torch import nn


class InAccelerate:
    def __init__(self, model: nn.Module, accumulation: int = 1) -> None:
        assert accumulation == 1
        self.accelerator = Accelerator(cpu=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer_for(model))

    def run(self, steps: Sequence[Step]) -> list[float]:
        losses = []
        for (batch,) in steps:
            with self.accelerator.accumulate(self.model):
                loss = mean_loss(self.model(batch["input"]), batch)
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses
