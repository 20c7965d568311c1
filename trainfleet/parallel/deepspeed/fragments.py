"""Fragments: where the elements of a parameter lie in the flat partitions that DeepSpeed's ZeRO keeps and updates.

Each rank holds one run of elements of a parameter, or none. Our checkpoints hold rectangles: of each tensor, rank
r of N has the r-th part of its rows. `whole` is the way from one to the other, a tensor at a time: a sum over the
ranks of words that are zero on all but one of them, which changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainfleet.comm.group import Group
from trainfleet.mesh import Mesh

_WORDS = {1: torch.uint8, 2: torch.uint8, 4: torch.int32, 8: torch.int64}  # gloo and NCCL add no int16


@dataclass(frozen=True, slots=True)
class Fragment:
    """The elements of one parameter that this rank updates."""

    flat: nn.Parameter
    """The partition: what the optimizer has as its parameter, float32, one-dimensional."""
    at: int
    """Where in `flat` they begin."""
    first: int
    """Number of the first of them in the parameter, read row by row."""
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """This run of elements of a tensor that is laid out as `flat`."""
        return flat.narrow(0, self.at, self.length)


def fragments(optimizer: Any, stage: int, group: Group) -> dict[nn.Parameter, Fragment]:
    """By parameter, what this rank holds of it; `optimizer` is DeepSpeed's of stages 1 to 3."""
    return dict(_of_stage_3(optimizer, group) if stage == 3 else _of_stages_1_and_2(optimizer))


def _of_stages_1_and_2(optimizer: Any) -> Iterator[tuple[nn.Parameter, Fragment]]:
    for flat, parameters in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups):
        for parameter in parameters:
            place = parameter._hp_mapping
            if place is not None:
                here, there = place.hp_fragment_address, place.lp_fragment_address
                yield parameter, Fragment(flat, here.start, there.start, here.numel)


def _of_stage_3(optimizer: Any, group: Group) -> Iterator[tuple[nn.Parameter, Fragment]]:
    for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups):
        for parameter in parameters:
            _, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            first = group.rank * size
            length = min(size, parameter.ds_numel - first)  # the last ranks hold padding, or nothing else
            if length > 0:
                yield parameter, Fragment(flat, at, first, length)


def gradient_pieces(optimizer: Any, stage: int) -> dict[nn.Parameter, list[Tensor]]:
    """By partition, this rank's share of the gradients as they were reduced, in tensors that follow one another."""
    if stage == 3:
        flats, offloaded = optimizer.fp32_partitioned_groups_flat, optimizer.offload_optimizer
    else:
        flats, offloaded = optimizer.single_partition_of_fp32_groups, optimizer.cpu_offload
    if offloaded:
        return {flat: [flat.grad] for flat in flats}
    return {flat: [piece.flatten() for piece in optimizer.averaged_gradients[i]] for i, flat in enumerate(flats)}


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, of which stage 3 may hold a part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole(piece: Tensor | None, first: int, shape: tuple[int, ...], dtype: torch.dtype, mesh: Mesh) -> Tensor:
    """The whole tensor on every rank, of which this rank holds the run of elements `piece` from number `first` on."""
    made = torch.zeros(shape, dtype=dtype, device=mesh.device)
    if piece is not None and piece.numel():
        made.view(-1)[first : first + piece.numel()].copy_(piece.reshape(-1))
    if mesh.data_axes.size > 1 and made.numel():
        mesh.data_axes.all_reduce_(made.view(-1).view(_WORDS[made.element_size()])).wait()
    return made


def rows(shape: tuple[int, ...], group: Group) -> slice:
    """Which rows of a tensor this rank keeps in checkpoints; a scalar has one, which rank 0 keeps."""
    length = shape[0] if shape else 1
    each = -(-length // group.size)
    return slice(min(group.rank * each, length), min((group.rank + 1) * each, length))
