"""The loop of DeepSpeed, with torch's optimizer, on the processor."""

from __future__ import annotations

from collections.abc import Sequence

import deepspeed
import torch.distributed as dist
from loops.setting import CLIP_NORM, Step, mean_loss, optimizer_for
from torch import nn

SMALL = {
    "reduce_bucket_size": 1 << 20,
    "stage3_prefetch_bucket_size": 1 << 20,
    "stage3_param_persistence_threshold": 0,
}
"""In elements. By default buckets are 2 GB, and stage 3 leaves parameters below 100,000 elements whole."""


class InDeepSpeed:
    def __init__(self, model: nn.Module, accumulation: int = 1, stage: int = 0, samples: int = 1) -> None:
        deepspeed.logger.setLevel("ERROR")
        config = {
            "train_batch_size": samples * accumulation * dist.get_world_size(),
            "train_micro_batch_size_per_gpu": samples,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": CLIP_NORM,
            "zero_optimization": {"stage": stage, **SMALL},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1_000_000,
        }
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer_for(model), config=config, dist_init_required=False
        )

    def run(self, steps: Sequence[Step]) -> list[float]:
        losses = []
        for micro_batches in steps:
            total = 0.0
            for batch in micro_batches:
                loss = mean_loss(self.engine(batch["input"]), batch)
                self.engine.backward(loss)
                self.engine.step()
                total += loss.item() / len(micro_batches)
            losses.append(total)
        return losses
