"""Recast: a low-precision layer keeps no copy of its weight for backward, but casts the gathered one again.

Autograd saves what a product was computed from: under autocast, the narrow copy of the weight. Every layer's would
stay from forward to backward and undo what ZeRO-3 frees: 2 bytes a parameter, for the whole model on each rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd


def recast(model: nn.Module, device_type: str) -> None:
    """Let the linear and convolution layers of `model` cast their weights again in backward. Same numbers."""
    for module in model.modules():
        if type(module) in _CALLS and "forward" not in vars(module) and "weight" in module._parameters:
            module.forward = _recasting(module, device_type)  # type: ignore[method-assign]


def _linear(module: nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight, module.bias)


def _convolution(module: _ConvNd, x: Tensor, weight: Tensor) -> Tensor:
    return module._conv_forward(x, weight, module.bias)  # type: ignore[no-any-return]


_CALLS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
}


def _recasting(module: Any, device_type: str) -> Callable[[Tensor], Tensor]:
    call, plain = _CALLS[type(module)], module.forward

    @functools.wraps(plain)
    def recasting(x: Tensor) -> Tensor:
        kept: Tensor = module.weight
        if isinstance(kept, DTensor):  # split over tensor-parallel ranks: its memory does not show
            return plain(x)  # type: ignore[no-any-return]
        if not (torch.is_grad_enabled() and torch.is_autocast_enabled(device_type) and kept.dtype == torch.float32):
            return plain(x)  # type: ignore[no-any-return]
        narrow = kept.to(torch.get_autocast_dtype(device_type))
        memory = narrow.untyped_storage().data_ptr()

        def pack(tensor: Tensor) -> Any:
            if tensor.untyped_storage().data_ptr() != memory:
                return tensor
            return tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            # In backward the parameter has been gathered again.
            return kept.detach().to(narrow_dtype).as_strided(*packed)

        narrow_dtype = narrow.dtype
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return call(module, x, narrow)

    return recasting
