"""Functions of torch with a rule of their own on sequences in pieces: embeddings and losses, position by position.

Of V tokens, tables and logits may lie in pieces over tensor-parallel ranks too (plan.tp_vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.nn import functional

from trainfleet.parallel.context.lift import names
from trainfleet.parallel.tensor.exchange import local_of, placed
from trainfleet.parallel.tensor.vocabulary import has_rule, looked_up, token_losses
from trainfleet.parallel.torch_private import StridedShard

Whole = Callable[..., Any]

TENSOR = "tp"
"""The axis over which layers are split."""


def embedding(
    mesh: DeviceMesh,
    whole: Whole,
    input: DTensor,
    weight: DTensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Each rank looks up its positions; the gradient of the table is a sum over ranks."""
    is_plain = max_norm is None and not scale_grad_by_freq and not sparse
    if is_plain and (axis := _axis_of(Shard(0), weight, apart_from=input)) is not None:
        return _embedding_of_pieces(input, weight, axis, padding_idx)
    if not is_plain or not _is_copied(weight):
        return whole(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    parts = [Replicate() if placement.is_replicate() else Partial() for placement in input.placements]
    found = functional.embedding(local_of(input), local_of(weight, *parts), padding_idx)
    return _like(found, input, (*input.shape, weight.shape[-1]))


def _embedding_of_pieces(input: DTensor, weight: DTensor, axis: int, padding_idx: int | None) -> DTensor:
    """Each rank of `axis` has the rows of its tokens; they are added up."""
    tokens, total = local_of(input), len(weight)
    if tokens.device.type == "cpu" and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < total:
        raise IndexError("index out of range in self")
    parts: list[Placement] = [Replicate() if lies.is_replicate() else Partial() for lies in input.placements]
    parts[axis] = Shard(0)
    rank = input.device_mesh.get_local_rank(axis)
    found = looked_up(tokens, local_of(weight, *parts), rank, padding_idx, total)
    lies = list(input.placements)
    lies[axis] = Partial()
    shape = torch.Size((*input.shape, weight.shape[-1]))
    stride = torch.empty(shape, device="meta").stride()
    rows = DTensor.from_local(found, input.device_mesh, lies, run_check=False, shape=shape, stride=stride)
    return placed(rows, *input.placements)


def cross_entropy(
    mesh: DeviceMesh,
    whole: Whole,
    input: DTensor,
    target: DTensor,
    weight: DTensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Each rank takes the losses of its positions, and never sees the logits of others."""
    classes = 0 if input.ndim == 1 else 1
    axis = _axis_of(Shard(classes), input, apart_from=target)
    options = (weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    if axis is not None and has_rule(input, target, *options):
        return _loss_of_pieces(input, target, axis, weight, ignore_index, reduction, label_smoothing)
    lies = [_without(placement, classes) for placement in input.placements]
    if target.is_floating_point() or None in lies or size_average is not None or reduce is not None:
        return whole(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    target = placed(target, *[placement for placement in lies if placement is not None])
    labels = local_of(target)
    weights = None if weight is None else local_of(placed(weight, *[Replicate()] * mesh.ndim)).detach()
    losses = functional.cross_entropy(
        local_of(input), labels, weights, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    each = _like(losses, target, target.shape)
    if reduction == "none":
        return each
    total = _sum(each)
    if reduction == "sum":
        return total
    counts = (labels != ignore_index).to(losses.dtype)
    if weights is not None:
        counts = weights[labels.clamp_min(0).where(labels != ignore_index, 0)] * counts
    return total / _sum(_like(counts, target, target.shape))


def _loss_of_pieces(
    input: DTensor,
    target: DTensor,
    axis: int,
    weight: DTensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
) -> Any:
    """Each rank of `axis` has the logits of its tokens, of the positions of this one."""
    mesh, classes = input.device_mesh, 0 if input.ndim == 1 else 1
    total = input.shape[classes]
    lies = [Replicate() if i == axis else _without(each, classes) for i, each in enumerate(input.placements)]
    target = placed(target, *[each for each in lies if each is not None])
    labels = local_of(target)
    is_known = (labels == ignore_index) | ((labels >= 0) & (labels < total))
    if labels.device.type == "cpu" and not bool(is_known.all()):
        raise IndexError(f"Target {int(labels[~is_known][0])} is out of bounds.")
    logits = local_of(input).movedim(classes, -1).reshape(labels.numel(), total // mesh.size(axis))
    by = None if weight is None else local_of(placed(weight, *[Replicate()] * mesh.ndim)).detach()
    losses, weights = token_losses(
        logits,
        labels.reshape(-1),
        mesh.get_group(axis),
        by,
        total=total,
        ignore_index=ignore_index,
        smoothing=smoothing,
    )
    result = _like(losses.view(labels.shape), target, target.shape)
    if reduction != "none":
        result = _sum(result)
    if reduction == "mean":
        weighed = _like(weights.view(labels.shape), target, target.shape)
        return (result / _sum(weighed)).to(input.dtype)
    return result.to(input.dtype)


def _axis_of(placement: Shard, array: DTensor, *, apart_from: DTensor) -> int | None:
    """The axis tp, if `array` lies so over it, evenly, where `apart_from` is whole."""
    axes = names(array.device_mesh)
    if TENSOR not in axes or len(axes) < 2 or array.placements[axes.index(TENSOR)] != placement:
        return None
    axis = axes.index(TENSOR)
    is_even = array.shape[placement.dim] % array.device_mesh.size(axis) == 0
    return axis if is_even and apart_from.placements[axis].is_replicate() else None


def by_element(loss: Callable[..., Tensor]) -> Callable[..., Any]:
    """The rule of a loss that takes (input, target, reduction=…), element by element."""

    def on_pieces(mesh: DeviceMesh, whole: Whole, input: DTensor, target: DTensor, *more: Any, **options: Any) -> Any:
        reduction = options.pop("reduction", "mean")
        if more or input.shape != target.shape or any(isinstance(each, Tensor) for each in options.values()):
            return whole(input, target, *more, reduction=reduction, **options)
        target = placed(target, *input.placements)
        each = _like(loss(local_of(input), local_of(target), reduction="none", **options), input, input.shape)
        if reduction == "none":
            return each
        return _sum(each) / (each.numel() if reduction == "mean" else 1)

    return on_pieces


def _is_copied(array: DTensor) -> bool:
    return all(placement.is_replicate() for placement in array.placements)


def _without(placement: Placement, dim: int) -> Placement | None:
    """How what lacks dimension `dim` lies, where this lies so; None where `dim` itself is in pieces."""
    if isinstance(placement, Replicate):
        return placement
    if not isinstance(placement, Shard | StridedShard) or placement.dim == dim:
        return None
    at = placement.dim - (placement.dim > dim)
    return Shard(at) if isinstance(placement, Shard) else StridedShard(at, split_factor=placement.split_factor)


def _like(local: Tensor, array: DTensor, shape: tuple[int, ...]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local.contiguous(), array.device_mesh, array.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _sum(array: DTensor) -> DTensor:
    total = array.sum()
    assert isinstance(total, DTensor)
    return placed(total, *[Replicate()] * array.device_mesh.ndim)


RULES: dict[Any, Callable[..., Any]] = {
    functional.embedding: embedding,
    functional.cross_entropy: cross_entropy,
    **{
        each: by_element(each)
        for each in (functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss)
    },
    functional.binary_cross_entropy_with_logits: by_element(functional.binary_cross_entropy_with_logits),
}
"""They get (mesh, compute whole, arguments of the function …)."""
