"""The bytes that live tensors of this process hold, told apart by what they are for."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, UntypedStorage, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

KINDS = ("parameters", "gradients", "optimizer state")


def storages() -> list[UntypedStorage]:
    """Of everything that lives now. As long as the list is kept, no later tensor can lie at the same address."""
    return list(_storages(_tensors()))


def held(optimizers: Iterable[Optimizer], besides: Sequence[UntypedStorage] = ()) -> dict[str, int]:
    """Bytes of each kind, and of `other`, without those of `besides`.

    Each storage counts once, as the first kind that it belongs to. Found by walking through every object of the
    interpreter: whatever library holds a tensor, and wherever.
    """
    tensors = _tensors()
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    kinds: dict[str, Iterable[Tensor]] = {
        "optimizer state": [value for state in states for value in state.values() if isinstance(value, Tensor)],
        "gradients": gradients,
        "parameters": [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)],
        "other": tensors,
    }
    seen = {storage.data_ptr() for storage in besides}
    found = dict.fromkeys(kinds, 0)
    for kind, members in kinds.items():
        for storage in _storages(members):
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[kind] += storage.nbytes()
    return found


def _tensors() -> list[Tensor]:
    gc.collect()
    return [found for found in gc.get_objects() if issubclass(type(found), Tensor)]


def _storages(tensors: Iterable[Tensor]) -> Iterator[UntypedStorage]:
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.device.type != "meta" and local.layout is torch.strided and local.untyped_storage().nbytes():
            yield local.untyped_storage()
