"""In a Context every function gives what the whole gives, values and gradients, of inputs and of parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from parallel.tensor.test_functions import CALLS
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel.context.region import Context
from trainfleet.plan import Plan

B, T, C = 4, 8, 12

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of x [B, T, C], a parameter [C, C] and tokens [B, T]."""

MIXING: dict[str, Call] = {
    "parameter": lambda x, w, t: F.linear(x, w) + w[0] * x + w.exp().sum(),
    "only the parameter": lambda x, w, t: w.square() + 1,
    "parameter and whole": lambda x, w, t: F.conv1d(x.mT, w[:, :, None].expand(C, C, 3), padding=1).mT,
    "looked up": lambda x, w, t: F.embedding(t, w) * x + F.embedding(t % 3, w, padding_idx=1),
    "looked up, scaled": lambda x, w, t: F.embedding(t, w, scale_grad_by_freq=True),
    "positions": lambda x, w, t: x * torch.arange(x.shape[1])[:, None] + w[: x.shape[1]].mT[:1, :, None].sum(),
    "learnt positions": lambda x, w, t: x + w[: x.shape[1]],
    "shifted": lambda x, w, t: F.pad(x, (0, 0, 1, 0))[:, :-1] * x + x.roll(2, 1),
    "shifted tokens": lambda x, w, t: F.embedding(F.pad(t, (2, 0))[:, : t.shape[1]], w) @ x.mT @ x,
    "sliced": lambda x, w, t: x[:, 1:] * x[:, :-1] + x[:, -1:].exp(),
    "joined": lambda x, w, t: torch.cat([w[None, :1].expand(len(x), -1, -1), x], 1) @ w,
    "running": lambda x, w, t: x.cumsum(1) * x.cumprod(1) + x.flip(1),
    "flat": lambda x, w, t: (x.flatten(0, 1) @ w).relu().view(x.shape) + F.linear(x.reshape(-1, C), w).exp().sum(),
    "flat products": lambda x, w, t: (
        torch.addmm(w[0], x.view(-1, C), w).view(x.shape) + torch.mm(x.view(-1, C), w).sum()
    ),
    "flat, normalised": lambda x, w, t: F.layer_norm(x.flatten(0, 1), (C,), w[0], w[1]).log_softmax(-1).view(x.shape),
    "flat, picked": lambda x, w, t: x.reshape(-1, C)[t.flatten() > 4] @ w,
    "flat, chunked": lambda x, w, t: x.view(-1, C).chunk(2, -1)[0].softmax(-1).unflatten(0, (B, -1)).sum(0),
    "scores": lambda x, w, t: (x @ w @ x.mT).masked_fill(torch.ones(T, T).triu(1).bool(), -9.0).softmax(-1) @ x,
    "masked": lambda x, w, t: ((t[:, :, None] % 2 == t[:, None] % 2).float() + 0.1) @ (x @ w),
    "heads": lambda x, w, t: (
        F.scaled_dot_product_attention(*(F.linear(x, w).unflatten(-1, (2, 6)).transpose(1, 2),) * 3, is_causal=True)
        .transpose(1, 2)
        .flatten(2)
    ),
    "statistics": lambda x, w, t: (x - x.mean(1, keepdim=True)) / x.var(1, keepdim=True) + x.std() + x.amax(1)[:, None],
    "sorted": lambda x, w, t: x.sort(1)[0] + x.gather(1, t[:, :, None].expand(x.shape) % T) + x.topk(2, 1)[0].sum(),
    "noise": lambda x, w, t: F.dropout(x @ w, 0.3) + F.dropout(x.flatten(0, 1), 0.5).sum() + torch.rand_like(x) * x,
    "written": lambda x, w, t: written(x) + x @ w,
    "written plain": lambda x, w, t: plainly(x, w) * x,
}
FUNCTIONS: dict[str, Call] = {name: (lambda x, w, t, call=call: call(x @ w)) for name, call in CALLS.items()}


def written(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x.detach()[:, :-1]
    y += x.detach()
    y.masked_fill_(y > 1, 0.5)
    return y


def plainly(x: Tensor, w: Tensor) -> Tensor:
    """Into plain memory, from which it is computed with a parameter."""
    y = torch.zeros(B, T, C)
    y[:, 2:] = x[:, 2:]
    return y @ w


def data(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(B, length, C, generator=generator), torch.randn(C, C, generator=generator) / 3
    return x, w, torch.randint(C, (B, length), generator=generator)


def computed(call: Call, context: Context | None, length: int = T) -> list[Tensor]:
    x, w, t = data(length)
    x.requires_grad_()
    w = nn.Parameter(w)
    torch.manual_seed(1)

    def compute(batch: list[Tensor]) -> Tensor:
        y = call(batch[0], w, batch[1])
        return (y * torch.linspace(-3, 3, y.numel()).cos().view(y.shape)).sum() + y.square().mean()

    loss = compute([x, t]) if context is None else context.run(compute, [x, t], strict=True)
    loss.backward()
    gradients = [w.grad if w.grad is not None else torch.zeros(()), x.grad if x.grad is not None else torch.zeros(())]
    if context is not None and context.axis == "cp":  # of what is plain, the mean of all ranks counts
        group = context.mesh.get_group()
        for gradient in gradients:
            torch.distributed.all_reduce(gradient, group=group)
            gradient /= group.size()
    return [loss.detach(), *gradients]


def wrong(calls: str | dict[str, Call], axis: str) -> list[str]:
    found = []
    with Mesh.from_env(Plan(**{axis: torch.distributed.get_world_size()})) as mesh:
        context = Context(mesh.torch[axis])
        for name, call in (globals()[calls] if isinstance(calls, str) else calls).items():
            length = 6 if calls == "FUNCTIONS" else T
            expected = computed(call, None, length)
            try:
                pairs = zip(
                    expected, computed(call, context, length), ("value", "gradient", "gradient of x"), strict=True
                )
                for one, other, what in pairs:
                    if one.shape != other.shape or not torch.allclose(one, other, rtol=2e-4, atol=2e-4):
                        found.append(f"{name}: {what} {one.flatten()[:3]} {other.flatten()[:3]}")
            except Exception as exc:
                found.append(f"{name}: {type(exc).__name__} {exc}"[:400])
    return found


@pytest.mark.parametrize("axis", ["cp", "tp"])
def test_what_mixes_positions_gives_what_the_whole_gives(ranks: RankPools, axis: str) -> None:
    assert ranks(2, wrong, "MIXING", axis) == [[], []]


@pytest.mark.matrix
@pytest.mark.parametrize("axis", ["cp", "tp"])
@pytest.mark.parametrize("calls", ["MIXING", "FUNCTIONS"])
def test_more_ranks_and_functions_give_what_the_whole_gives(ranks: RankPools, calls: str, axis: str) -> None:
    size = 2 if calls == "FUNCTIONS" else 4
    assert ranks(size, wrong, calls, axis) == [[]] * size


def refused() -> str:
    with Mesh.from_env(Plan(cp=2)) as mesh, pytest.raises(PlanError) as caught:
        context = Context(mesh.torch["cp"], "ring")

        def compute(batch: list[Tensor]) -> Tensor:
            y = batch[0] * 1.0
            y[:, 0] = 0.0
            return y.sum()

        context.run(compute, [torch.ones(2, 4, requires_grad=True)])
    return str(caught.value)


def test_a_change_in_place_through_which_gradients_flow_is_refused(ranks: RankPools) -> None:
    assert "__setitem__" in ranks(2, refused)[0]
