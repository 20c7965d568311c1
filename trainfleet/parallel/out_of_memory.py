"""Out of memory, told so that a person can act: rank, phase, the largest holders, and what to turn, in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainfleet.errors import OutOfMemory
from trainfleet.parallel.layout import piece_of
from trainfleet.parallel.spread import spread_of
from trainfleet.plan import Plan
from trainfleet.stopwatch import timed

_IN = {"optimizer": "optimizer step"}
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


@contextmanager
def phase(name: str, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Inside, time counts as `name`, one of `stopwatch.PHASES`; torch's error of memory becomes one that names it."""
    try:
        with timed(name):
            yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as exc:
        if not _is_out_of_memory(exc):
            raise
        raise _explained(name, model, optimizer, exc) from exc


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(sign in str(error).lower() for sign in _SIGNS)


def _explained(name: str, model: nn.Module, optimizer: Optimizer, cause: BaseException) -> OutOfMemory:
    spread = spread_of(model)
    on = torch.device(spread.mesh.device)
    holders = sorted(held_bytes(model, optimizer, on).items(), key=lambda item: -item[1])
    held = ", ".join(f"{holder} {size / 2**20:.0f} MiB" for holder, size in holders if size)
    return OutOfMemory(
        f"Rank {spread.mesh.rank} ran out of memory on {spread.mesh.device} in {_IN.get(name, name)}. "
        f"Held there: {held or 'little'}. ({(str(cause) or type(cause).__name__).splitlines()[0]})",
        hint=f"In this order: {'; '.join(_remedies(spread.plan))}.",
    )


def held_bytes(model: nn.Module, optimizer: Optimizer, on: torch.device | str) -> dict[str, int]:
    """Bytes on a device that this rank holds of parameters, gradients, optimizer state and buffers."""
    parameters = list(model.parameters())
    memory = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    held: dict[str, list[Tensor]] = {
        "parameters": [*parameters],
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer state": memory,
        "buffers": list(model.buffers()),
    }
    return {name: sum(_bytes(tensor, torch.device(on).type) for tensor in tensors) for name, tensors in held.items()}


def _bytes(tensor: Tensor, on: str) -> int:
    piece = piece_of(tensor)
    return piece.numel() * piece.element_size() if piece.device.type == on else 0


def _remedies(plan: Plan) -> list[str]:
    remedies = ["a smaller batch.micro_batch with more batch.accumulation"]
    if plan.recompute != "blocks":
        remedies.append("plan.recompute=blocks")
    elif plan.recompute_every > 1:
        remedies.append("plan.recompute_every=1")
    if plan.zero < 3:
        remedies.append(f"plan.zero={plan.zero + 1}")
    if plan.offload == "none":
        remedies.append("plan.offload=optimizer")
    if plan.zero == 3 and plan.offload != "parameters":
        remedies.append("plan.offload=parameters")
    return remedies
