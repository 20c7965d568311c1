"""Every function that computes on pieces gives what the whole gives, values and gradients, however pieces lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from piecewise import differences
from rank_pool import RankPools
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from trainfleet.parallel.tensor.functions import ASKED, ON_PIECES

SHAPE = (4, 6, 12)
ONES, WEIGHT = torch.ones(12), torch.linspace(-1, 1, 60).view(5, 12)


def changed(x: Tensor) -> Tensor:
    y = x.clone()
    y += 1
    y *= x.detach()
    y -= ONES
    y /= 2
    return y.add_(1).mul_(2).sub_(x.detach()).div_(3).clamp_(-1, 2).neg_().masked_fill_(x.detach() > 1, 0.5).relu_()


def compared(x: Tensor) -> Tensor:
    y = x.detach().round()
    either = torch.logical_or(y == 1, y.eq(0)) | torch.logical_and(y.ge(1), y.gt(0)) & ~torch.logical_not(y.lt(2))
    return x * (either.float() + y.le(1).half().float() + (y != 0).bfloat16().float() + y.ne(2).double().float())


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x + 1) * x - x / 2 + 3 * x - (1 - x) + 2 / (x * x + 1) + (-x) + x**2,
    "functions": lambda x: torch.add(x, x).sub(x).mul(x).div(2).neg().abs().square().pow(0.5),
    "powers": lambda x: (x.square() + 1).sqrt() + (x.abs() + 1).rsqrt() + (x.abs() + 1).log() + x.exp().reciprocal(),
    "waves": lambda x: x.sin() + x.cos() + x.erf() + x.clamp(-1, 1) + x.clamp_min(0) + x.clamp_max(0.5),
    "activations": lambda x: F.gelu(x) + F.silu(x) + F.relu(x) + x.sigmoid() + x.tanh() + F.mish(x) + F.softplus(x),
    "more activations": lambda x: F.leaky_relu(x) + F.elu(x) + F.gelu(x, approximate="tanh"),
    "scaled activations": lambda x: F.selu(x) + F.celu(x),
    "choices": lambda x: torch.where(x > 0, x, -x) + x.masked_fill((x < -1) | (x > 1), 3.0) + torch.minimum(x, x * x),
    "comparisons": lambda x: x * ((x >= 0) & ~(x <= -1)).float() + torch.maximum(x, -x) + (x != 0).to(x.dtype),
    "casts": lambda x: x.double().float() + x.to(torch.float64).type_as(x) + x.contiguous() + x.clone() + x.detach(),
    "in place": changed,
    "compared": compared,
    "aliases": lambda x: x.multiply(2).subtract(x).divide(2).true_divide(3).swapdims(0, 1) + x.exp().swapdims(0, 1),
    "plain partners": lambda x: x * ONES + torch.arange(6.0)[:, None] * x,
    "views": lambda x: x.view(4, 6, 3, 4).permute(2, 0, 3, 1).transpose(0, 1).flatten(1, 2).reshape(4, -1),
    "more views": lambda x: x.unflatten(-1, (2, -1)).movedim(0, 2).unsqueeze(1).squeeze(1).swapaxes(0, 1),
    "heads": lambda x: x.view(4, 6, 4, 3).transpose(1, 2).contiguous().transpose(1, 2).flatten(2),
    "expansions": lambda x: x[:, None].expand(4, 2, 6, 12) * x.unsqueeze(1).expand_as(x[:, None].expand(4, 2, 6, 12)),
    "indices": lambda x: x[1:3, :, 2:10:3].sum() + x[..., None, -1] * 2 + x[0, 1, 4] + x[None, 2, :4, 5:].sum(),
    "narrowed": lambda x: x.narrow(-1, 3, 5) * x.select(0, 1)[..., 2:7],
    "parts": lambda x: x.chunk(3, -1)[1] * x.split(4, 2)[0] + x.split([5, 4, 3], -1)[1] + x.chunk(5, 1)[0].sum(),
    "unpacked": lambda x: [a * 2 for a in x][1] + x.unbind(0)[2] + torch.unbind(x, 1)[3].sum(),
    "joined": lambda x: (
        torch.cat([x, x * 2], -1).sum(1) + torch.stack([x, x], 0).sum((0, 2)).repeat_interleave(2, -1)[:, :1]
    ),
    "repeated": lambda x: x.view(4, 6, 4, 3).repeat_interleave(2, 2) * 2,
    "products": lambda x: F.linear(x, WEIGHT) @ torch.ones(5, 3) + torch.matmul(x, WEIGHT.mT[:, :3]),
    "bias": lambda x: F.linear(x, WEIGHT, torch.arange(5.0)),
    "between pieces": lambda x: torch.bmm(x, x.mT) + x @ x.transpose(-2, -1) + torch.einsum("bij,bkj->bik", x, x),
    "flat products": lambda x: torch.mm(x[0], x[1].t()) + torch.addmm(ONES[:6], x[0], x[1].T),
    "batched": lambda x: torch.baddbmm(torch.ones(4, 6, 6), x, x.mT, alpha=0.5),
    "softmax": lambda x: x.softmax(-1) + F.log_softmax(x, 1) + torch.softmax(x, 0),
    "norms": lambda x: F.layer_norm(x, (12,), ONES * 2, ONES) + F.rms_norm(x, (12,), ONES * 3),
    "sums": lambda x: x.sum() + x.mean(-1) * x.sum(1).sum(-1, keepdim=True) + x.mean((1, 2))[:, None],
    "asked": lambda x: x * x.shape[1] + x.size(-1) * x.numel() + x.dim() + len(x) + x.stride(0) * x.is_contiguous(),
    "not listed": lambda x: x.cumsum(-1) + x.logcumsumexp(-1) + F.mse_loss(x, 2 * x) + x.amax() + x.flip(-1) + x.std(),
    "not listed either": lambda x: F.pad(x, (1, 1)).cumprod(1) + F.normalize(x, dim=-1).sum() + F.glu(x).prod(),
    "drawn": lambda x: x * torch.rand_like(x) + F.alpha_dropout(x, 0.2, True) + F.dropout1d(x, 0.3),
    "attention of torch": lambda x: F.multi_head_attention_forward(
        *(x, x, x, 12, 2, torch.ones(36, 12) / 9, torch.ones(36), None, None, False, 0.2, torch.eye(12), torch.ones(12))
    )[0],
}


PLACEMENTS = (Shard(0), Shard(1), Shard(2), Replicate())


def wrong(placements: tuple[Any, ...]) -> list[str]:
    return differences(CALLS, placements, SHAPE)


def test_pieces_of_the_last_dimension_give_what_the_whole_gives(ranks: RankPools) -> None:
    assert ranks(2, wrong, (Shard(2),)) == [[], []]


@pytest.mark.matrix
def test_all_pieces_give_what_the_whole_gives(ranks: RankPools) -> None:
    assert ranks(2, wrong, PLACEMENTS) == [[], []]


def test_every_function_on_the_list_is_held() -> None:
    from torch.overrides import TorchFunctionMode

    called: set[str] = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(func.__name__)
            return func(*args, **(kwargs or {}))

    for call in CALLS.values():
        with Watch():
            call(torch.randn(SHAPE))
    missing = {name for name in ON_PIECES - ASKED if not name.startswith("__")} - called
    assert missing == set()
