"""Partition: of inputs that all tensor-parallel ranks have alike, each keeps a piece until backward gathers them
(Rajbhandari et al., arXiv:1910.02054, section 6.1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainfleet.comm.group import Group
from trainfleet.errors import PlanError
from trainfleet.parallel.activations import addresses, tensors_of
from trainfleet.parallel.replicas import digests
from trainfleet.parallel.torch_private import in_backward, innermost_saving_hooks, with_local, without_torch_functions


def partition_inputs(blocks: Sequence[nn.Module], group: Group) -> None:
    """Let the ranks of `group` keep a piece each of the inputs of `blocks`, and gather them in backward.

    The inputs must be equal on all of them to the bit; PlanError in the first call of a block for which they are not.
    Inputs that lie in pieces already, or need no gradient, stay.
    """
    for block in blocks:
        block.forward = _in_pieces(block, block.forward, group)  # type: ignore[method-assign]


@dataclass(frozen=True, slots=True)
class _Piece:
    """This rank's part of a tensor that all ranks have alike, in the order of its memory."""

    part: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    like: DTensor | None


def _in_pieces(block: nn.Module, forward: Callable[..., Any], group: Group) -> Callable[..., Any]:
    is_checked = False

    @functools.wraps(forward)
    def in_pieces(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_checked
        if not torch.is_grad_enabled() or in_backward():
            return forward(*args, **kwargs)
        inputs = [each for each in tensors_of(args, kwargs) if each.requires_grad and _is_copy(each)]
        if not is_checked:
            is_checked = True
            _refuse_unequal(block, inputs, group)
        cuttable = addresses(inputs) - addresses(block.parameters())
        made: dict[tuple[Any, ...], _Piece] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            functools.partial(_cut, cuttable, made, group), functools.partial(_gathered, group)
        ):
            return forward(*args, **kwargs)

    return in_pieces


def kept_in_pieces(wholes: Sequence[Any], group: Group) -> torch.autograd.graph.saved_tensors_hooks:
    """Inside, of what is saved for backward in the memory of `wholes`, each rank of `group` keeps a piece.

    Those are DTensors that every rank has whole, and the caller holds them until it leaves. Plain tensors that share
    their memory may be pieces of them, and stay.
    """
    held = [each for each in wholes if isinstance(each, DTensor) and each.requires_grad and _is_copy(each)]
    cuttable, made = addresses(held), dict[tuple[Any, ...], _Piece]()
    pack, unpack = innermost_saving_hooks()

    def cut(tensor: Tensor) -> Any:
        kept = _cut(cuttable, made, group, tensor) if isinstance(tensor, DTensor) else tensor
        return kept if isinstance(kept, _Piece) else pack(kept)

    return torch.autograd.graph.saved_tensors_hooks(
        cut, lambda kept: _gathered(group, kept) if isinstance(kept, _Piece) else unpack(kept)
    )


@torch.no_grad()
def _cut(cuttable: set[int], made: dict[tuple[Any, ...], _Piece], group: Group, tensor: Tensor) -> Any:
    if not _is_copy(tensor):
        return tensor
    with without_torch_functions():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        number = local.numel()
        is_dense = torch.empty_like(local, device="meta").stride() == local.stride()
        if not is_dense or number < group.size or local.untyped_storage().data_ptr() not in cuttable:
            return tensor
        key = (local.data_ptr(), local.dtype, local.size(), local.stride(), local._version)
        if key not in made:
            flat = local.as_strided((number,), (1,))
            length = -(-number // group.size)
            part = flat.new_zeros(length)
            own = flat[group.rank * length : (group.rank + 1) * length]
            part[: len(own)] = own
            like = with_local(tensor, local.new_empty(0)) if isinstance(tensor, DTensor) else None
            made[key] = _Piece(part, local.size(), local.stride(), like)
        return made[key]


@torch.no_grad()
def _gathered(group: Group, kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with without_torch_functions():
        flat = torch.cat(group.all_gather(kept.part))
        local = flat.as_strided(kept.size, kept.stride)
        return local if kept.like is None else with_local(kept.like, local)


def _is_copy(tensor: Tensor) -> bool:
    """Whether every rank holds all of a tensor."""
    if isinstance(tensor, DTensor):
        return all(placement.is_replicate() for placement in tensor.placements)
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


@torch.no_grad()
def _refuse_unequal(block: nn.Module, inputs: Sequence[Tensor], group: Group) -> None:
    with without_torch_functions():
        local = {str(i): each.to_local() if isinstance(each, DTensor) else each for i, each in enumerate(inputs)}
        theirs = group.exchange(digests(local))
    if odd := [rank for rank, each in enumerate(theirs) if each != theirs[0]]:
        raise PlanError(
            f"plan.activations is 'partition', but the inputs of a {type(block).__name__} differ between ranks 0 and "
            f"{odd[0]} of plan.tp, so one cannot keep a piece for the other. Set activations to 'keep' or 'offload'."
        )
