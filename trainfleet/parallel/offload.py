"""Offload: optimizer state rests in (pinned) CPU memory and visits the device for the step.

Activations are gone when the optimizer runs, so the visit fits where the activations were; the numbers are those
of a step without offload. Where the parameters are offloaded FSDP2 keeps everything in CPU memory and steps there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainfleet.parallel.torch_private import with_local


class StateOffload:
    """Moves the state of `optimizer` to the device before each step and back after it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._hooks = [
            optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: self._move(optimizer, to_cpu=False)),
            optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self._move(optimizer, to_cpu=True)),
        ]

    def _move(self, optimizer: Optimizer, *, to_cpu: bool) -> None:
        leaves_gpu = False
        for parameter, state in optimizer.state.items():
            device = torch.device("cpu") if to_cpu else parameter.device
            for name, value in state.items():
                # Scalars such as the step count already live where their optimizer wants them.
                if isinstance(value, Tensor) and value.ndim and value.device != device:
                    leaves_gpu = leaves_gpu or value.is_cuda
                    state[name] = _moved(value, device)
        if to_cpu and leaves_gpu:
            torch.cuda.synchronize()  # the copies are read by the CPU, by a checkpoint for instance

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _moved(value: Tensor, device: torch.device) -> Tensor:
    if isinstance(value, DTensor):
        return with_local(value, _moved(value.to_local(), device))
    if device.type == "cpu" and value.device.type == "cuda":
        pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return pinned.copy_(value, non_blocking=True)
    return value.to(device, non_blocking=True)
