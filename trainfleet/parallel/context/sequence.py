"""Which arrays of a batch are sequences, and this rank's piece of each."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trainfleet.batch import Batch, arrays, map_arrays
from trainfleet.errors import DataError
from trainfleet.parallel.context.lift import AXIS, lifted
from trainfleet.parallel.tensor.exchange import placed

SWITCH_OFF = {"cp": "plan.cp to 1", "tp": "plan.tp_sequence to false"}
"""By the axis over which sequences are in pieces, what is to be set where they cannot be."""


def length_of(batch: Batch, size: int, *, strict: bool, axis: str = AXIS) -> int | None:
    """The length of the sequences of `batch`: dimension 1 of its first array that has one.

    None where there is none, or `size` ranks do not divide it; DataError with the remedy instead, if `strict`.
    """
    shapes = [tuple(array.shape) for array in arrays(batch) if isinstance(array, Tensor)]
    shape = next((shape for shape in shapes if len(shape) > 1), None)
    if shape is not None and shape[1] % size == 0 and shape[1] > 0:
        return int(shape[1])
    if not strict:
        return None
    if shape is None:
        raise DataError(
            f"plan.{axis}={size} splits sequences, dimension 1 of [B, S, …], but no array of the batch has two "
            f"dimensions: its shapes are {shapes}. Set {SWITCH_OFF[axis]}."
        )
    divisors = [divisor for divisor in range(1, shape[1] + 1) if shape[1] % divisor == 0]
    few = ", ".join(map(str, divisors[:8])) + (", …" if len(divisors) > 8 else "")
    raise DataError(
        f"plan.{axis}={size} does not divide the {shape[1]} positions of a sequence (dimension 1 of the batch's first "
        f"array, {list(shape)}). Pad or pack to a multiple of {size}, use one of {axis} = {few}, or set "
        f"{SWITCH_OFF[axis]}."
    )


def split_sequences(batch: Batch, mesh: DeviceMesh, length: int) -> Batch:
    """The batch with its arrays [B, length, …] as DTensors in pieces along dimension 1; others stay whole."""
    return map_arrays(functools.partial(_piece, mesh, length), batch)


def described(batch: Batch, length: int) -> str:
    """Which shapes are split, in words."""
    shapes = [tuple(array.shape) for array in arrays(batch)]
    cut = ", ".join(str(list(shape)) for shape in shapes if _is_sequence(shape, length))
    whole = ", ".join(str(list(shape)) for shape in shapes if not _is_sequence(shape, length))
    return f"of a batch, arrays {cut} are split along dimension 1" + (f", {whole} are whole on each" if whole else "")


def _is_sequence(shape: tuple[int, ...], length: int) -> bool:
    return len(shape) > 1 and shape[1] == length


def _piece(mesh: DeviceMesh, length: int, array: Any) -> Any:
    if not isinstance(array, Tensor) or isinstance(array, DTensor) or not _is_sequence(tuple(array.shape), length):
        return array
    if array.requires_grad and torch.is_grad_enabled():
        return placed(lifted(array, mesh), Shard(1))
    part = length // mesh.size()
    own = array.narrow(1, mesh.get_local_rank() * part, part).contiguous()
    return DTensor.from_local(own, mesh, [Shard(1)], run_check=False)
