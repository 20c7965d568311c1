"""The fused loss is the plain one, gradients too, and never holds all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_pool import RankPools
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from trainfleet.errors import DataError
from trainfleet.kernels import linear_cross_entropy
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize
from trainfleet.plan import Plan

TOKENS, WIDTH, VOCABULARY = 37, 16, 53


def arguments(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    )
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    targets[3] = targets[-1] = -100
    return hidden, weight, bias, targets


def gradients(total: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [total.detach(), *torch.autograd.grad(total * 0.5, leaves)]


@pytest.mark.parametrize("rows", [1, 5, 37, 100])
def test_it_is_the_plain_loss_in_stretches_of_any_length(rows: int) -> None:
    hidden, weight, bias, targets = arguments()
    loss = linear_cross_entropy(hidden, weight, targets, bias, rows=rows)
    plain = cross_entropy(linear(hidden, weight, bias), targets, reduction="sum")
    assert loss.weight == TOKENS - 2
    for ours, theirs in zip(gradients(loss.total, hidden, weight, bias), gradients(plain, hidden, weight, bias)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_batches_of_sequences_without_a_bias() -> None:
    hidden, weight, _, targets = arguments()
    hidden, targets = hidden[:36].reshape(4, 9, WIDTH), targets[:36].reshape(4, 9)
    loss = linear_cross_entropy(hidden, weight, targets)
    plain = cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss.total, plain)


def test_only_what_wants_a_gradient_gets_one() -> None:
    hidden, weight, bias, targets = arguments()
    frozen = linear_cross_entropy(hidden, weight.detach(), targets, bias.detach()).total
    (gradient,) = torch.autograd.grad(frozen, [hidden])
    whole = linear_cross_entropy(hidden, weight, targets, bias).total
    assert torch.equal(gradient, torch.autograd.grad(whole, [hidden])[0])
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, bias).total, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_products_are_narrow_and_sums_wide(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = arguments(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        ours = gradients(linear_cross_entropy(hidden, weight, targets, bias, rows=5).total, hidden, weight)
        logits = linear(hidden, weight, bias).float()
        plain = gradients(cross_entropy(logits, targets, reduction="sum"), hidden, weight)
    exact = gradients(cross_entropy(linear(hidden, weight, bias), targets, reduction="sum"), hidden, weight)
    for a, b, wide in zip(ours, plain, exact):
        assert a.dtype == torch.float32
        assert (a - wide).norm() <= 1.1 * (b - wide).norm() + 1e-6 * wide.norm()


class Largest(TorchDispatchMode):
    """The most numbers that any one tensor had."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.numbers = max(self.numbers, each.numel())
        return out


def test_the_logits_of_all_tokens_never_exist() -> None:
    hidden, weight = torch.randn(512, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, torch.randint(300, (512,)), rows=8).total.backward()
    assert largest.numbers <= 8 * 300


def test_no_tokens_are_a_loss_of_nothing() -> None:
    hidden, weight, _, _ = arguments()
    loss = linear_cross_entropy(hidden[:0], weight, torch.empty(0, dtype=torch.int64))
    assert loss.total == 0 and loss.weight == 0
    assert torch.equal(torch.autograd.grad(loss.total, [weight])[0], torch.zeros_like(weight))


def test_misfits_are_refused() -> None:
    hidden, weight, _, targets = arguments()
    with pytest.raises(DataError, match=r"hidden is \[37, 16\], weight \[53, 16\] and targets \[36\]"):
        linear_cross_entropy(hidden, weight, targets[1:])
    targets[0] = VOCABULARY
    with pytest.raises(DataError, match="the vocabulary has 53 entries, 0 to 52"):
        linear_cross_entropy(hidden, weight, targets)


class Speaker(nn.Module):
    """Its head is its embedding, and its output is the loss."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor, targets: Tensor) -> LossSum:
        hidden = self.middle(self.embedding(tokens)).tanh()
        if self.fused:
            return linear_cross_entropy(hidden, self.embedding.weight, targets, rows=3)
        logits = linear(hidden, self.embedding.weight).float()
        return LossSum(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel())


def trained(plan: Plan, fused: bool) -> list[float]:
    with Mesh.from_env(plan) as mesh:
        torch.manual_seed(0)
        model = parallelize(Speaker(fused=fused), mesh, plan)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        engine = NativeEngine(model, optimizer, lambda output, batch: output)
        draw = torch.Generator().manual_seed(mesh.rank)
        found = []
        for _ in range(4):
            tokens = torch.randint(VOCABULARY, (3, 8), generator=draw)
            loss: Any = engine.forward_backward([{"tokens": tokens, "targets": tokens.roll(-1, 1)}])
            found += [loss.mean, engine.clip(1.0)]
            engine.step()
        return found


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_in_a_sharded_model_with_tied_weights(precision: Any, tolerance: float, ranks: RankPools) -> None:
    plain = ranks(2, trained, Plan(precision=precision), False)[0]
    assert ranks(2, trained, Plan(zero=3, precision=precision), True)[0] == pytest.approx(plain, rel=tolerance)
