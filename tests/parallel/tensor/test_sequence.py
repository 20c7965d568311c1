"""Between split layers sequences are in pieces: what travels, what is kept, what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from rank_pool import RankPools
from split_models import LENGTH, WIDTH, build, tokens
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import parallelize
from trainfleet.parallel.spread import spread_of
from trainfleet.parallel.tensor import sequence
from trainfleet.plan import Plan


class Travels(TorchDispatchMode):
    """Counts exchanges of more than a few numbers, and notes what norms give."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and isinstance(result, Tensor) and result.numel() > WIDTH:
            self.counts[func._opname] += 1
        return result


def exchanged(plan: Plan, name: str) -> tuple[dict[str, int], list[tuple[int, ...]]]:
    """What a forward and backward exchange, and the shapes of the residual stream on this rank."""
    shapes: list[tuple[int, ...]] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        shapes.append(tuple((output.to_local() if isinstance(output, DTensor) else output).shape))

    with Mesh.from_env(plan) as mesh:
        torch.manual_seed(0)
        model = parallelize(build(name), mesh, plan).train()
        for block in model.blocks:  # type: ignore[union-attr]
            block.register_forward_hook(note)
        context, batch = spread_of(model).context, tokens(0)["input"]

        def compute(given: Tensor) -> Tensor:
            return model(given).square().sum()  # type: ignore[no-any-return]

        total = compute(batch) if context is None else context.run(compute, batch)
        with Travels() as travels:
            total = compute(batch) if context is None else context.run(compute, batch)
            total.backward()
        return dict(travels.counts), shapes


@pytest.mark.parametrize("name", ["grouped", "fused"])
def test_sums_are_scattered_and_residuals_are_pieces(ranks: RankPools, name: str) -> None:
    counts, shapes = ranks(2, exchanged, Plan(tp=2), name)[0]
    assert counts["all_reduce"] == 8  # of 2 x 2 layers, forward and backward
    assert set(shapes) == {(2, LENGTH, WIDTH)}
    counts, shapes = ranks(2, exchanged, Plan(tp=2, tp_sequence=True), name)[0]
    assert counts["reduce_scatter_tensor"] == 8
    assert "all_reduce" not in counts or counts["all_reduce"] == 2  # the embedding's gradient and the head's
    assert set(shapes) == {(2, LENGTH // 2, WIDTH)}


class Flat(nn.Module):
    """Layers that compute with [B x T, C], as those of GPT-2."""

    def __init__(self, changed: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.changed = changed

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.up.bias, x.view(-1, WIDTH), self.up.weight.T).relu()
        y = torch.addmm(self.down.bias, y, self.down.weight.T)
        if self.changed:
            y.add_(1.0)
        return y.view(x.shape).tanh()


def flat(plan: Plan, changed: bool) -> tuple[list[Tensor], list[bool]]:
    """Output and gradients of a flat layer in a residual; whether its sum waited for its dimensions."""
    waited: list[bool] = []
    is_sum = sequence._is_sum

    def noted(tensor: Any) -> bool:
        waited.append(is_sum(tensor))
        return waited[-1]

    with Mesh.from_env(plan) as mesh:
        torch.manual_seed(0)
        model = parallelize(nn.Sequential(nn.LayerNorm(WIDTH), Flat(changed)), mesh, plan)
        x = torch.randn(2, LENGTH, WIDTH)
        output = model(x)
        (output * x).sum().backward()
        gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        return [output.detach(), *(each for each in gradients if each is not None)], waited


def test_a_flat_sum_is_scattered_when_it_has_its_dimensions_again(ranks: RankPools) -> None:
    expected = ranks(1, flat, Plan(), False)[0][0]
    for found, _ in ranks(2, flat, Plan(tp=2, tp_sequence=True), False):
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=2e-5, atol=1e-5)


def refused() -> str:
    try:
        flat(Plan(tp=2, tp_sequence=True), True)
    except PlanError as exc:
        return str(exc)
    return ""


def test_a_change_of_a_flat_sum_in_place_is_refused(ranks: RankPools) -> None:
    assert all("calls add_ on a tensor" in said and "plan.tp_whole=[1]" in said for said in ranks(2, refused))
