"""A trace tells what was computed, whole and by name; two of them show where a mistake begins."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from oracle import adamw, case_of_model  # noqa: E402
from rank_pool import RankPools  # noqa: E402

from trainfleet.mesh import Mesh  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402
from trainfleet.training.proof.case import Case, comparable, together  # noqa: E402
from trainfleet.training.proof.trace import shake_gradients, trace  # noqa: E402
from trainfleet.training.proof.verdict import compare  # noqa: E402


def traced(name: str, plan: Plan, fault: str | None = None) -> Any:
    """A trace on the ranks; `fault` plants a classic silent mistake."""
    from trainfleet.parallel.replicate import GradientAverage

    average = GradientAverage.finish
    if fault == "a rank's gradients are not averaged":
        GradientAverage.finish = lambda self: None  # type: ignore[method-assign]
        GradientAverage._on_gradient = lambda self, parameter: None  # type: ignore[method-assign]
    try:
        with Mesh.from_env(plan) as mesh:
            return trace(case_of_model(name), plan, mesh)
    finally:
        GradientAverage.finish = average  # type: ignore[method-assign]


def reference(name: str, ranks: int) -> Any:
    with Mesh.from_env(Plan()) as mesh:
        return trace(together(comparable(case_of_model(name), Plan())[0], ranks), Plan(), mesh)


def test_a_clean_plan_holds_and_gradients_are_compared(ranks: RankPools) -> None:
    found = ranks(2, traced, "transformer", Plan(zero=2))[0]
    verdict = compare(ranks(1, reference, "transformer", 2)[0], found, "fp32")
    assert verdict.holds and verdict.first is None
    assert any("gradient of blocks.0.qkv.weight" in name for name in found)
    assert "agree" in str(verdict)


def test_a_missing_average_is_found_at_the_first_gradient(ranks: RankPools) -> None:
    found = ranks(2, traced, "transformer", Plan(), "a rank's gradients are not averaged")[0]
    verdict = compare(ranks(1, reference, "transformer", 2)[0], found, "fp32")
    assert not verdict.holds and verdict.first is not None
    assert verdict.first.tensor.startswith("step 1, gradient of")
    assert "First to differ: step 1, gradient of" in str(verdict)


class Attention(torch.nn.Module):
    """Its keys have a bias, which changes no softmax: its gradient is rounding, whatever computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = torch.nn.Linear(16, 4)

    def forward(self, x: Any) -> Any:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def attention_batch(number: int) -> Any:
    draw = torch.Generator().manual_seed(number)
    return torch.randn(3, 5, 16, generator=draw), torch.randn(3, 5, 4, generator=draw)


def squared(output: Any, batch: Any) -> Any:
    return (output - batch[1]).square().mean()


def attention_traced(plan: Plan, ranks: int) -> Any:
    torch.manual_seed(0)
    work = Case(build=Attention, loss_fn=squared, micro_batch=attention_batch, optimizer=adamw, accumulation=ranks)
    with Mesh.from_env(plan) as mesh:
        return trace(work, plan, mesh)


def test_what_adam_makes_of_rounding_is_no_difference(ranks: RankPools) -> None:
    one, two = ranks(1, attention_traced, Plan(), 2)[0], ranks(2, attention_traced, Plan(zero=2), 1)[0]
    verdict = compare(one, two, "fp32")
    assert verdict.holds, str(verdict)
    assert "16 elements of parameters, most of them in attention.in_proj_bias" in verdict.remarks[0]


def test_gradients_are_shaken_by_a_part_of_their_size() -> None:
    model = torch.nn.Linear(50, 50)
    model.weight.grad, model.bias.grad = torch.full((50, 50), 2.0), None
    state = torch.get_rng_state()
    shake_gradients(model, 1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.bias.grad is None
    assert (model.weight.grad - 2).square().mean().sqrt().item() == pytest.approx(2e-3, rel=0.1)
