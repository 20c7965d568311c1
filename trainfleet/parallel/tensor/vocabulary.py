"""The vocabulary in pieces: embeddings and heads split by tokens, and a cross-entropy that never gathers the logits.

Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3. N positions, V tokens, c = V / ranks of them on each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from trainfleet.errors import PlanError
from trainfleet.parallel.tensor.exchange import local_of, placed, whole_of
from trainfleet.parallel.tensor.layer import Region, layer_of
from trainfleet.stopwatch import timed

_SOURCE = "plan.tp_vocabulary"


def vocabulary_regions(
    model: nn.Module, size: int, regions: Sequence[Region], left_whole: set[nn.Module]
) -> list[Region]:
    """The heads of `model`, which give as many numbers as an embedding has tokens, and those embeddings.

    Raises PlanError where there are none, or `size` does not divide the vocabulary.
    """
    paired = {name for r in regions if r.columns and r.rows for name in (*r.columns, *r.rows)}
    embeddings = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module not in left_whole and _is_plain(module)
    }
    counts = {module.num_embeddings for module in embeddings.values()}
    heads = {
        name: module
        for name, module in model.named_modules()
        if (layer := layer_of(module)) is not None
        and layer.out_features in counts
        and not layer.is_convolution
        and name not in paired
        and module not in left_whole
    }
    counts = {layer.out_features for module in heads.values() if (layer := layer_of(module)) is not None}
    embeddings = {name: module for name, module in embeddings.items() if module.num_embeddings in counts}
    _refuse(model, size, heads, embeddings)
    found = [Region(name=name, module=each, columns=(), rows=(), source=_SOURCE) for name, each in embeddings.items()]
    return found + [
        Region(name=name, module=each, columns=(name,), rows=(), source=_SOURCE) for name, each in heads.items()
    ]


def _is_plain(embedding: nn.Embedding) -> bool:
    return embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse


def _refuse(
    model: nn.Module, size: int, heads: Mapping[str, nn.Module], embeddings: Mapping[str, nn.Embedding]
) -> None:
    if not heads:
        raise PlanError(
            f"plan.tp_vocabulary is set, but {type(model).__name__} has no linear layer that gives as many numbers "
            "as an embedding has tokens, outside of what is split already. Set plan.tp_vocabulary to false."
        )
    for name, embedding in embeddings.items():
        if embedding.num_embeddings % size:
            raise PlanError(
                f"plan.tp={size} does not divide the vocabulary of {embedding.num_embeddings} tokens of {name}. "
                "Set plan.tp_vocabulary to false, or give the model a few more tokens."
            )
    users: defaultdict[int, dict[nn.Module, str]] = defaultdict(dict)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)][module] = name
    split = {*heads.values(), *embeddings.values()}
    for name, module in (*heads.items(), *embeddings.items()):
        for parameter in module.parameters(recurse=False):
            if others := [other for user, other in users[id(parameter)].items() if user not in split]:
                raise PlanError(
                    f"plan.tp_vocabulary splits {name}, which shares a parameter with {others[0] or 'the model'}. "
                    "Set plan.tp_vocabulary to false."
                )


def split_embedding(
    mesh: DeviceMesh,
    whole: Callable[..., Any],
    input: DTensor,
    weight: DTensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """`embedding` of tokens with the weight [V, D] split by tokens: each rank looks up its own, and all add up."""
    is_plain = max_norm is None and not scale_grad_by_freq and not sparse
    if weight.placements[0] != Shard(0) or weight.shape[0] % mesh.size() or not is_plain:
        return whole(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    tokens = whole_of(input)
    if tokens.device.type == "cpu" and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(weight):
        return whole(input, weight, padding_idx)  # which tells of it
    found = looked_up(tokens, local_of(weight), mesh.get_local_rank(), padding_idx, len(weight))
    return placed(DTensor.from_local(found, mesh, [Partial()], run_check=False), Replicate())


def looked_up(tokens: Tensor, table: Tensor, rank: int, padding_idx: int | None, total: int) -> Tensor:
    """The rows [..., D] of `tokens` in this rank's piece [c, D] of a table of `total`; zeros for those of others."""
    own, is_own = _own(tokens, rank, len(table))
    found = torch.nn.functional.embedding(own, table)
    if padding_idx is not None:  # its row gets no gradient
        found = torch.where((tokens == padding_idx % total).unsqueeze(-1), found.detach(), found)
    return found.masked_fill(~is_own.unsqueeze(-1), 0.0)


def _own(tokens: Tensor, rank: int, length: int) -> tuple[Tensor, Tensor]:
    """Where each token lies in this rank's piece, 0 where it does not, and whether it does."""
    local = tokens - rank * length
    is_own = (local >= 0) & (local < length)
    return torch.where(is_own, local, 0), is_own


def split_cross_entropy(
    mesh: DeviceMesh,
    whole: Callable[..., Any],
    input: DTensor,
    target: DTensor,
    weight: DTensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """`cross_entropy` of logits [N, V, ...] in pieces of V and targets [N, ...]; all else is computed whole.

    Three numbers of each position travel: the largest logit, the sum of exponentials, the logit of the target.
    Computed in float32 or wider; what is returned is plain, equal on all ranks, in the dtype of the logits.
    """
    dim = 1 if input.ndim > 1 else 0
    total = input.shape[dim]
    options = (weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    is_split = input.placements[0] == Shard(dim) and total % mesh.size() == 0
    if not is_split or not has_rule(input, target, *options):
        return whole(input, target, *options)
    wanted = whole_of(target).reshape(-1)
    if wanted.device.type == "cpu" and not bool((_is_token(wanted, total) | (wanted == ignore_index)).all()):
        return whole(input, target, *options)  # which tells of it
    logits = local_of(input).movedim(dim, -1).reshape(len(wanted), total // mesh.size())
    by = None if weight is None else whole_of(weight)
    losses, weights = token_losses(
        logits, wanted, mesh.get_group(), by, total=total, ignore_index=ignore_index, smoothing=label_smoothing
    )
    if reduction == "none":
        result = losses.reshape(target.shape)
    else:
        result = losses.sum() if reduction == "sum" else losses.sum() / weights.sum()
    return result.to(input.dtype)


def has_rule(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
    label_smoothing: float,
) -> bool:
    """Whether `token_losses` knows a cross-entropy with these arguments: of labels, not of probabilities."""
    dim = 1 if input.ndim > 1 else 0
    return (
        target.dtype == torch.int64
        and target.shape == (*input.shape[:dim], *input.shape[dim + 1 :])
        and size_average is None
        and reduce is None
        and (weight is None or label_smoothing == 0.0)
        and reduction in ("none", "sum", "mean")
        and 0.0 <= label_smoothing <= 1.0
    )


def token_losses(
    logits: Tensor,
    wanted: Tensor,
    group: dist.ProcessGroup,
    weight: Tensor | None,
    *,
    total: int,
    ignore_index: int,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Losses [N] and what each weighs, of this rank's logits [N, c] of `total` and all targets [N]."""
    is_kept = wanted != ignore_index
    losses = _TokenLoss.apply(logits, wanted, group, smoothing, total)  # type: ignore[no-untyped-call]
    losses = torch.where(is_kept, losses, 0.0)
    if weight is None:
        return losses, is_kept.to(losses.dtype)
    of_each = weight[torch.where(_is_token(wanted, total), wanted, 0)]
    weights = torch.where(is_kept, of_each, 0.0).to(losses.dtype)
    return losses * weights, weights


def _is_token(wanted: Tensor, total: int) -> Tensor:
    return (wanted >= 0) & (wanted < total)


class _TokenLoss(torch.autograd.Function):
    """Logits [N, c] of this rank and targets [N] to losses [N], equal on all ranks."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, group: dist.ProcessGroup, smoothing: float, total: int
    ) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        largest = wide.amax(-1)
        with timed("communication"):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        centred = wide - largest[:, None]
        own, is_own = _own(target, dist.get_rank(group), logits.shape[-1])
        at_target = centred.gather(-1, own[:, None]).squeeze(-1).masked_fill(~is_own, 0.0)
        of_all = centred.sum(-1) if smoothing else torch.zeros_like(at_target)
        exponentials = centred.exp_()
        numbers = torch.stack([exponentials.sum(-1), at_target, of_all])
        with timed("communication"):
            dist.all_reduce(numbers, group=group)
        partition, at_target, of_all = numbers.unbind()
        log_partition = partition.log()
        losses = log_partition - at_target
        if smoothing:
            losses = (1 - smoothing) * losses + smoothing * (log_partition - of_all / total)
        ctx.save_for_backward(exponentials.div_(partition[:, None]), own, is_own)
        ctx.smoothing, ctx.total, ctx.dtype = smoothing, total, logits.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        probabilities, own, is_own = ctx.saved_tensors
        result = (probabilities - ctx.smoothing / ctx.total) * grad[:, None]
        at_target = torch.where(is_own, (1 - ctx.smoothing) * grad, 0.0)
        result.scatter_add_(-1, own[:, None], -at_target[:, None])
        return result.to(ctx.dtype), None, None, None, None


@contextmanager
def kept_in(local: Any, mode: Any) -> Iterator[None]:
    """While it is entered, heads leave their logits in pieces, and `mode` computes with them."""
    before = getattr(local, "logits", None)
    local.logits = mode
    try:
        with mode:
            yield
    finally:
        local.logits = before
