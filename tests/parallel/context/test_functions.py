"""Embeddings and losses of sequences in pieces give what those of the whole give, with all of their options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from parallel.context.test_region import B, C, Call, T, wrong
from rank_pool import RankPools
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainfleet.kernels import linear_cross_entropy
from trainfleet.mesh import Mesh
from trainfleet.parallel.context.region import Context
from trainfleet.plan import Plan

LOSSES: dict[str, Call] = {
    "mean": lambda x, w, t: F.cross_entropy((x @ w).flatten(0, 1), t.flatten()),
    "sum": lambda x, w, t: F.cross_entropy((x @ w).view(-1, C), t.view(-1), reduction="sum"),
    "some": lambda x, w, t: F.cross_entropy((x @ w).flatten(0, 1), t.where(t > 3, -100).flatten()),
    "all options": lambda x, w, t: F.cross_entropy(
        (x @ w).transpose(1, 2), t, torch.linspace(0.1, 2, C), ignore_index=3, label_smoothing=0.1
    ),
    "each": lambda x, w, t: F.cross_entropy((x @ w).mT, t, reduction="none") * torch.arange(T),
    "next": lambda x, w, t: F.cross_entropy((x @ w)[:, :-1].reshape(-1, C), t[:, 1:].reshape(-1)),
    "next, padded": lambda x, w, t: F.cross_entropy(
        (x @ w).float().view(-1, C), F.pad(t, (0, 1), value=-100)[..., 1:].contiguous().view(-1), ignore_index=-100
    ),
    "probabilities": lambda x, w, t: F.cross_entropy((x @ w).mT, (x * 0.1).softmax(-1).mT),
    "squares": lambda x, w, t: F.mse_loss(x @ w, x) + F.l1_loss(x, x @ w, reduction="sum") + F.huber_loss(x, x @ w),
    "smooth": lambda x, w, t: F.smooth_l1_loss(x @ w, x, beta=0.5) + F.mse_loss(x @ w, x, reduction="none").max(),
    "binary": lambda x, w, t: F.binary_cross_entropy_with_logits(x @ w, (x > 0).float()),
    "fused": lambda x, w, t: linear_cross_entropy(x, w, t.where(t > 3, -100), w[0]).mean_tensor,
    "of logarithms": lambda x, w, t: F.nll_loss((x @ w).log_softmax(-1).flatten(0, 1), t.flatten()),
    "contrast": lambda x, w, t: F.cross_entropy(F.normalize(x.mean(1)) @ F.normalize(x[:, 0] @ w).T, torch.arange(B)),
}


def wrong_losses(axis: str) -> list[str]:
    return wrong(LOSSES, axis)


@pytest.mark.parametrize("axis", ["cp", "tp"])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_losses_give_what_the_whole_gives(ranks: RankPools, size: int, axis: str) -> None:
    assert ranks(size, wrong_losses, axis) == [[]] * size


def logits_of_a_rank() -> list[int]:
    """How many logits one rank has at the loss."""
    seen: list[int] = []
    with Mesh.from_env(Plan(cp=2)) as mesh:
        context = Context(mesh.torch["cp"], "ring")
        plain = F.cross_entropy

        def watched(input: Tensor, target: Tensor, *more: object, **options: object) -> Tensor:
            seen.append(input.to_local().numel() if isinstance(input, DTensor) else input.numel())
            return plain(input, target, *more, **options)

        def compute(batch: list[Tensor]) -> Tensor:
            logits = F.linear(batch[0], torch.ones(5, C))
            return watched(logits.flatten(0, 1).float(), batch[1].flatten())

        context.run(compute, [torch.ones(B, T, C), torch.ones(B, T, dtype=torch.int64)])
    return seen


def test_no_rank_sees_the_logits_of_others(ranks: RankPools) -> None:
    assert ranks(2, logits_of_a_rank) == [[B * T * 5 // 2]] * 2
