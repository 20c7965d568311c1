"""Place: deal the blocks of a model out to several devices of one process, in turn, for people with two cards.

One device computes at a time, so this gives room and no speed; plan.pp, with a process a device, gives both. What was
tested: the assignment and equal numbers with ("cpu", "cpu"), and a forward over two CUDA devices with tensors that have
devices but no numbers, where torch refuses every operation on tensors of two devices. Two real cards were not at hand.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trainfleet.balance import cut
from trainfleet.batch import arrays, map_arrays, to_device
from trainfleet.errors import PlanError
from trainfleet.parallel.tensor.region import writes

logger = logging.getLogger(__name__)

_CROSSING = {"copy_", "to", "__get__", "__set__", "type_as"}
"""Functions of torch that take tensors of two devices as they are."""


def place(
    model: nn.Module, blocks: Sequence[nn.Module], devices: Sequence[str], entry_points: Sequence[str] = ()
) -> dict[str, torch.device]:
    """Deal `blocks` out to `devices` in turn, in place, by the size of their parameters; where each parameter is.

    What comes before the first block is on the first device, what comes after the last on the last one, to which
    outputs come too. Inputs are moved where a block is called. Elsewhere a function that gets tensors of two devices
    computes on the later one, so skip connections, masks and tied parameters, which are on the device of their first
    owner, are right. Parameters stay the same objects. Raises PlanError before anything is changed.
    """
    places = [_known(name) for name in devices]
    outer = _outermost(blocks)
    if len(outer) < len(places):
        raise PlanError(
            f"plan.devices names {len(places)} devices, but {type(model).__name__} has {len(outer)} blocks to deal "
            "out. Name fewer devices, or more modules in plan.blocks."
        )
    homes = assignment(model, outer, places)
    _move(model, homes)
    for block in outer:
        block.forward = _at(homes[block], block.forward)  # type: ignore[method-assign]
    for call in ("forward", *entry_points):
        setattr(model, call, _over(places, getattr(model, call)))
    found = {name: parameter.device for name, parameter in model.named_parameters()}
    counts = [sum(homes[block] is place for block in outer) for place in places]
    logger.info("Blocks on %s.", ", ".join(f"{name}: {count}" for name, count in zip(devices, counts)))
    return found


def assignment(
    model: nn.Module, blocks: Sequence[nn.Module], devices: Sequence[torch.device]
) -> dict[nn.Module, torch.device]:
    """The device of every module: contiguous runs of blocks, the heaviest run as light as can be."""
    ranges: dict[nn.Module, int] = {module: i for i, block in enumerate(blocks) for module in block.modules()}
    nearest, costs = 0, [0.0] * len(blocks)
    index: dict[nn.Module, int] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        nearest = ranges.get(module, nearest)
        index[module] = nearest
    # In the order of the model: what is registered after the last block goes with it.
    for module, i in index.items():
        for parameter in module.parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                costs[i] += parameter.numel() * parameter.element_size()
    device_of = [device for device, part in zip(devices, cut(costs, len(devices))) for _ in part]
    return {module: device_of[i] for module, i in index.items()}


def _move(model: nn.Module, homes: Mapping[nn.Module, torch.device]) -> None:
    moved: set[nn.Parameter] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter not in moved:
                moved.add(parameter)
                parameter.data = parameter.data.to(homes[module])
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(homes[module])


def _at(device: torch.device, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a block with its inputs on `device`."""

    @functools.wraps(forward)
    def placed(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = to_device((args, kwargs), device)
        return forward(*args, **kwargs)

    return placed


def _over(devices: Sequence[torch.device], forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of the model: inputs on the first device, outputs on the last."""

    @functools.wraps(forward)
    def placed(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = to_device((args, kwargs), devices[0])
        with _Together(devices):
            output = forward(*args, **kwargs)
        return to_device(output, devices[-1])

    return placed


class _Together(TorchFunctionMode):
    """While it is entered, every function of torch takes tensors of several of the devices."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        super().__init__()
        self._order = {device: i for i, device in enumerate(devices)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        called = getattr(func, "__name__", str(func))
        found = [each for each in arrays((args, kwargs)) if isinstance(each, Tensor) and each.device in self._order]
        if len({each.device for each in found}) < 2 or called in _CROSSING:
            return func(*args, **kwargs)
        if writes(called, kwargs):
            target = kwargs["out"].device if isinstance(kwargs.get("out"), Tensor) else args[0].device
        else:
            # What is computed moves on, never back; parameters and buffers come to where it is.
            computed = [each for each in found if each.grad_fn is not None] or found
            target = max((each.device for each in computed), key=self._order.__getitem__)
        args, kwargs = map_arrays(functools.partial(self._moved, target), (args, kwargs))
        return func(*args, **kwargs)

    def _moved(self, target: torch.device, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device not in self._order or value.device == target:
            return value
        return value.to(target)


def _outermost(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    inside = {module for block in blocks for module in block.modules() if module is not block}
    return [block for block in blocks if block not in inside]


def _known(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise PlanError(f"plan.devices names {name!r}, which is no device. Use names such as 'cuda:0'.") from exc
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise PlanError(
                f"plan.devices names {name!r}, but torch sees {torch.cuda.device_count()} GPU(s) here. Name those."
            )
    elif device.type == "meta":
        raise PlanError("plan.devices names 'meta', which holds no numbers. Use names such as 'cuda:0'.")
    return device
