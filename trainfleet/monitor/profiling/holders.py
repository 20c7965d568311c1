"""Who holds memory now: the storages of all tensors that Python knows, each once, and whose they are."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Held:
    """A storage and who holds it."""

    kind: str
    """parameters, gradients, optimizer, buffers, batch; other where nobody of those holds it."""
    device: str
    address: int
    size_bytes: int
    shape: tuple[int, ...]
    """Of the first tensor that was found there."""
    parts: tuple[tuple[str, int], ...]
    """(module, bytes) of the tensors that lie there, such as the gradients in a bucket; together `size_bytes`."""


Tensors = Iterable[tuple[str, str, "Tensor"]]
"""(kind, module, tensor)"""


def held_by(model: nn.Module | None, optimizer: Optimizer | None) -> list[tuple[Held, torch.UntypedStorage]]:
    """The storages of parameters, gradients, optimizer state and buffers on this rank, each once."""
    return _by_storage(_named(model, optimizer))


def all_held(
    model: nn.Module | None, optimizer: Optimizer | None, batch: Any = None
) -> list[tuple[Held, torch.UntypedStorage]]:
    """Those of `held_by`, of the tensors in `batch`, and of every other tensor that Python's garbage collector knows.

    What C++ alone holds is missing, such as what autograd keeps of a graph. Takes tenths of a second.
    """
    from torch import Tensor

    # Not isinstance: proxies of other libraries would import things.
    others = (("other", "", each) for each in gc.get_objects() if issubclass(type(each), Tensor))
    in_batch = (("batch", "", tensor) for tensor in _tensors(batch))
    return _by_storage(itertools.chain(_named(model, optimizer), in_batch, others))


def storages_of(tensor: Tensor) -> Iterator[tuple[torch.UntypedStorage, Tensor]]:
    """The storages of a tensor on this rank with the tensor that lies there; several of one that is made of others."""
    from torch import Tensor
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(tensor):  # DTensor, and others that wrap tensors
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        for inner in (getattr(tensor, name) for name in names):
            if isinstance(inner, Tensor):  # a DTensor names its mesh too
                yield from storages_of(inner)
        return
    try:
        storage = tensor.untyped_storage()
        if storage.device.type != "meta" and storage.data_ptr() and storage.nbytes():
            yield storage, tensor
    except (NotImplementedError, RuntimeError):
        return  # sparse ones and fakes have none; the parts of sparse ones are tensors too


def _by_storage(tensors: Tensors) -> list[tuple[Held, torch.UntypedStorage]]:
    first: dict[tuple[str, int], tuple[str, torch.UntypedStorage, Tensor]] = {}
    parts: dict[tuple[str, int], dict[str, int]] = {}
    for kind, module, tensor in tensors:
        for storage, part in storages_of(tensor):
            place = str(storage.device), storage.data_ptr()
            if first.setdefault(place, (kind, storage, part))[0] == kind:
                sizes = parts.setdefault(place, {})
                sizes[module] = sizes.get(module, 0) + part.numel() * part.element_size()
    found = []
    for place, (kind, storage, part) in first.items():
        shares = _shares(parts[place], storage.nbytes())
        found.append((Held(kind, *place, storage.nbytes(), tuple(part.shape), shares), storage))
    return found


def _shares(sizes: Mapping[str, int], whole: int) -> tuple[tuple[str, int], ...]:
    """`whole` dealt out by `sizes`: tensors may lie on one another, or leave room between them."""
    together = sum(sizes.values()) or 1
    shares = {module: whole * size // together for module, size in sizes.items()}
    largest = max(shares, key=lambda module: shares[module])
    shares[largest] += whole - sum(shares.values())
    return tuple(shares.items())


def _named(model: nn.Module | None, optimizer: Optimizer | None) -> Tensors:
    parameters = dict(model.named_parameters()) if model is not None else {}
    modules = {id(parameter): name.rpartition(".")[0] for name, parameter in parameters.items()}
    held = [p for group in optimizer.param_groups for p in group["params"]] if optimizer is not None else []
    everyone = [*parameters.values(), *(parameter for parameter in held if id(parameter) not in modules)]
    for parameter in everyone:
        yield "parameters", modules.get(id(parameter), ""), parameter
    for parameter in everyone:
        if parameter.grad is not None:
            yield "gradients", modules.get(id(parameter), ""), parameter.grad
    for name, buffer in model.named_buffers() if model is not None else ():
        yield "buffers", name.rpartition(".")[0], buffer
    for parameter, state in optimizer.state.items() if optimizer is not None else ():
        for tensor in _tensors(state):
            yield "optimizer", modules.get(id(parameter), ""), tensor


def _tensors(state: Any) -> Iterator[Any]:
    """Those in a nested value, however deep they lie."""
    from torch import Tensor

    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)
