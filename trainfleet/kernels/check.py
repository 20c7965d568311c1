"""check_kernel: does every implementation of a kernel compute what its twin says, gradients included?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainfleet.errors import TrainfleetError
from trainfleet.kernels.register import Kernel

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest deviation that rounding explains, as a part of a tensor's largest number: sums of some thousand products."""
WIDE = {torch.bfloat16: torch.float64, torch.float16: torch.float64, torch.float32: torch.float64}
WIDE |= {torch.complex64: torch.complex128}


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How near one tensor of an implementation is to the twin's."""

    device: str
    layout: str
    """How the arguments lay in memory."""
    tensor: str
    deviation: float
    """The largest difference of an element, as a part of the largest number of the twin's tensor."""
    tolerance: float


def check_kernel(kernel: Kernel[Any, Any], *args: Any, tolerance: float | None = None) -> list[Agreement]:
    """Hold `kernel` against its twin on `args`: on each device that it runs on, as given and with strided arguments.

    The twin computes in float64 on the CPU. Outputs are compared, and the gradients of all floating-point arguments
    for one random gradient of the outputs; torch's own check of operators (schema, shapes, autograd, tracing) runs
    too. Devices that are not here are named in a warning. `tolerance` replaces the table's.
    Raises TrainfleetError at the first tensor that differs, or argument that is changed.
    """
    found: list[Agreement] = []
    expected = dict(_run(kernel.twin, [_wide(each) for each in args]))
    for device in ["cpu", *(each for each in kernel.devices if each != "cpu")]:
        if not _is_here(device):
            logger.warning("There is no %s here, so kernel %s was not checked on it.", device, kernel.name)
            continue
        here = [each.to(device, copy=True) if isinstance(each, Tensor) else each for each in args]
        for layout, given in (("as given", here), ("strided", [_strided(each) for each in here])):
            where = f"Kernel {kernel.name} on {device}, arguments {layout}"
            before = [each.clone() if isinstance(each, Tensor) else each for each in given]
            for name, value in _run(kernel, given):
                _refuse_changes(where, before, given)
                agreement = Agreement(
                    device=device,
                    layout=layout,
                    tensor=name,
                    deviation=_deviation(where, name, value, expected.get(name)),
                    tolerance=tolerance or TOLERANCE.get(_real(value.dtype), 0.0),
                )
                if not agreement.deviation <= agreement.tolerance:
                    raise TrainfleetError(
                        f"{where}: {name} differs from that of its twin by {agreement.deviation:.1e} of its largest "
                        f"number; rounding explains {agreement.tolerance:.1e}."
                    )
                found.append(agreement)
        _check_registration(kernel, here)
    return found


def _run(function: Callable[..., Any], args: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """Outputs, and then gradients of the floating-point arguments, by name."""
    leaves = _leaves(args)
    output = function(*leaves)
    outputs = output if isinstance(output, tuple) else (output,)
    for i, each in enumerate(outputs):
        yield f"output {i}", each.detach()
    draw = torch.Generator().manual_seed(0)
    pairs = [
        (each, torch.randn(each.shape, generator=draw, dtype=torch.float64).to(each))
        for each in outputs
        if each.requires_grad
    ]
    if pairs:
        torch.autograd.backward([each for each, _ in pairs], [each for _, each in pairs])
    for place, each in enumerate(leaves):
        if isinstance(each, Tensor) and each.requires_grad:
            yield f"the gradient of argument {place}", each.grad if each.grad is not None else torch.zeros_like(each)


def _leaves(args: list[Any]) -> list[Any]:
    return [
        each.detach().requires_grad_(each.is_floating_point() or each.is_complex())
        if isinstance(each, Tensor)
        else each
        for each in args
    ]


def _refuse_changes(where: str, before: list[Any], after: list[Any]) -> None:
    for place, (old, new) in enumerate(zip(before, after)):
        if isinstance(old, Tensor) and not torch.equal(old, new):
            raise TrainfleetError(f"{where}: argument {place} was changed. Compute into new memory.")


def _deviation(where: str, name: str, found: Tensor, expected: Tensor | None) -> float:
    if expected is None or found.shape != expected.shape:
        wanted = "no such tensor" if expected is None else f"the shape {tuple(expected.shape)}"
        raise TrainfleetError(f"{where}: {name} has the shape {tuple(found.shape)}, and its twin {wanted}.")
    wide = found.detach().cpu().to(expected.dtype)
    finite = expected.isfinite()
    if not torch.equal(finite, wide.isfinite()):
        raise TrainfleetError(f"{where}: {name} is finite where its twin is not, or the other way round.")
    if not finite.any():
        return 0.0
    distance = (wide - expected).abs()[finite].max().item()
    size = expected[finite].abs().max().item()
    return distance / size if size else (0.0 if distance == 0 else float("inf"))


def _check_registration(kernel: Kernel[Any, Any], args: list[Any]) -> None:
    try:
        torch.library.opcheck(kernel.operator, tuple(_leaves(args)))
    except Exception as exc:
        raise TrainfleetError(f"Kernel {kernel.name} is not a sound operator of torch: {exc}") from exc


def _wide(value: Any) -> Any:
    return value.detach().cpu().to(WIDE.get(value.dtype, value.dtype)) if isinstance(value, Tensor) else value


def _strided(value: Any) -> Any:
    """The same numbers in every other place of memory."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    roomy = value.new_zeros((*value.shape, 2))
    roomy[..., 0] = value
    return roomy[..., 0]


def _real(dtype: torch.dtype) -> torch.dtype:
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)


def _is_here(device: str) -> bool:
    if device == "cpu":
        return True
    module = getattr(torch, device, None)
    return module is not None and bool(module.is_available())
