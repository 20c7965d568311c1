"""Layers that cast their weights again give the same gradients and keep no narrow weight from forward to backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import MODELS
from oracle import whole
from rank_pool import RankPools
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize
from trainfleet.parallel.precision import cast_compute
from trainfleet.parallel.recast import recast
from trainfleet.plan import Plan


class Casts(TorchDispatchMode):
    """Sees every tensor cast to low precision; knows which still have their memory."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[weakref.ref[Tensor], tuple[int, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and output.dtype in (torch.bfloat16, torch.float16):
            self._seen.append((weakref.ref(output), tuple(output.shape)))
        return output

    def alive(self) -> set[tuple[int, ...]]:
        return {shape for tensor, shape in self._seen if tensor() is not None}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 9, bias=False), nn.Tanh(), nn.Linear(9, 3))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, groups=1), nn.Tanh(), nn.Conv2d(3, 6, 3, padding="same", padding_mode="circular")
    )


@pytest.mark.parametrize(("build", "shape"), [(perceptron, (4, 5)), (images, (2, 2, 9, 9))])
def test_gradients_are_the_same_and_narrow_weights_are_gone(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    found, held = [], []
    for casts_again in (False, True):
        torch.manual_seed(0)
        model = build()
        weights = {tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim > 1}
        if casts_again:
            recast(model, "cpu")
        cast_compute(model, Plan(precision="bf16"), "cpu")
        x = torch.randn(shape, requires_grad=True)
        with Casts() as casts:
            output = model(x)
        held.append(casts.alive() & weights)
        output.square().sum().backward()
        found.append([x.grad, output, *(parameter.grad for parameter in model.parameters())])
    assert all(map(torch.equal, *found))
    assert held == [weights, set()]


def test_outside_of_autocast_and_without_gradients_a_layer_is_as_it_was() -> None:
    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    plain = layer(x)
    recast(layer, "cpu")
    assert torch.equal(layer(x), plain) and plain.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def steps(plan: Plan) -> list[Tensor]:
    case = MODELS["transformer"]
    with Mesh.from_env(plan) as mesh:
        model = parallelize(case.build(0), mesh, plan)
        engine = NativeEngine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), case.loss_fn)
        with Casts() as casts:
            output = model(case.micro_batch(0, 0)["input"])
        assert (32, 16) not in casts.alive(), "the widest matrix of a block"
        del output
        for step in range(3):
            engine.forward_backward([case.micro_batch(0, 4 * step + mesh.rank + i) for i in (0, 2)])
            engine.step()
        return [whole(parameter) for parameter in model.parameters()]


def test_a_sharded_step_has_the_same_numbers(ranks: RankPools) -> None:
    """Recomputation casts again too; it is the other way to the same gradients."""
    for precision in ("bf16", "fp16"):
        kept, again = (
            ranks(2, steps, Plan(zero=3, precision=precision, recompute=how))[0] for how in ("blocks", "none")
        )
        assert all(map(torch.equal, kept, again))
