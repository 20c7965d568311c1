"""make_engine: the engine that a spread model's plan asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trainfleet.batch import Batch
from trainfleet.parallel.arrival import Prepare
from trainfleet.parallel.deepspeed.engine import DeepSpeedEngine
from trainfleet.parallel.engine import Engine, LossFunction, NativeEngine
from trainfleet.parallel.pipeline.engine import PipelineEngine
from trainfleet.parallel.spread import spread_of


def make_engine(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFunction,
    *,
    forward: Callable[[nn.Module, Batch], Any] | None = None,
    prepare: Prepare | None = None,
    seed: int | None = 0,
) -> Engine:
    """The Engine for `model`, which went through `parallelize`; arguments are those of `NativeEngine`."""
    if spread_of(model).plan.engine == "deepspeed":
        return DeepSpeedEngine(model, optimizer, loss_fn, forward=forward, prepare=prepare, seed=seed)
    kind = PipelineEngine if spread_of(model).pipeline is not None else NativeEngine
    return kind(model, optimizer, loss_fn, forward=forward, prepare=prepare, seed=seed)
