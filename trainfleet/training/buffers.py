"""Buffers: what a forward has done to a model's buffers is undone where its step brings no update.

A bad batch reaches the running statistics of a BatchNorm in the forward, before anybody has seen the loss. They would
stay poisoned for ever, and evaluations with them, though the weights were spared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from trainfleet.batch import Batch
from trainfleet.training.watcher import Watcher

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainfleet.parallel import Engine


class Buffers(Watcher):
    """Copies the buffers of this rank before each step, and puts them back where the step is given up."""

    def __init__(self) -> None:
        self._places: list[tuple[nn.Module, str]] = []
        self._copies: list[Tensor | None] = []

    def start(self, engine: Engine) -> None:
        self._places = [(module, name) for module in engine.model.modules() for name in module._buffers]
        self._copies = [None] * len(self._places)

    @torch.no_grad()
    def begin(self, step: int, micro_batches: Sequence[Batch]) -> None:
        for i, (module, name) in enumerate(self._places):
            buffer, copy = module._buffers[name], self._copies[i]
            if buffer is not None and copy is not None and _alike(buffer, copy):
                copy.copy_(buffer)
            else:
                self._copies[i] = None if buffer is None else buffer.detach().clone()

    @torch.no_grad()
    def give_up(self) -> None:
        for (module, name), copy in zip(self._places, self._copies, strict=True):
            buffer = module._buffers[name]
            if buffer is not None and copy is not None and _alike(buffer, copy):
                buffer.copy_(copy)  # in place: others may hold it
            else:
                module._buffers[name] = None if copy is None else copy.clone()

    def close(self) -> None:
        self._places, self._copies = [], []


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
