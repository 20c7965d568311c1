"""Out of memory is told with rank, phase, holders and remedies; other errors pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.errors import OutOfMemory
from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize
from trainfleet.parallel.out_of_memory import held_bytes, phase
from trainfleet.plan import Plan

PETABYTE = 1 << 50


class Greedy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(600, 600), nn.Tanh()) for _ in range(2))
        self.register_buffer("table", torch.zeros(1 << 18))

    def forward(self, x: Tensor, where: str) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if where == "forward":
            torch.empty(PETABYTE)
        return Hungry.apply(x, where == "backward")


class Hungry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, hungry: bool) -> Tensor:
        ctx.hungry = hungry
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.hungry:
            torch.empty(PETABYTE)
        return gradient, None


class HungryAdamW(torch.optim.AdamW):
    hungry = False

    def step(self, closure: Any = None) -> Any:
        if self.hungry:
            torch.empty(PETABYTE)
        return super().step(closure)


def call(model: nn.Module, batch: tuple[Tensor, str]) -> Tensor:
    return model(*batch)


def mean(output: Tensor, batch: Any) -> Tensor:
    return output.mean()


def starve(plan: Plan) -> dict[str, tuple[str, str | None]]:
    with Mesh.from_env(plan) as mesh:
        model = parallelize(Greedy(), mesh, plan)
        optimizer = HungryAdamW(model.parameters())
        engine = NativeEngine(model, optimizer, mean, forward=call)
        x = torch.ones(2, 600)
        engine.forward_backward([(x, "")])
        engine.step()
        found = {}
        for where in ("forward", "backward"):
            with pytest.raises(OutOfMemory) as caught:
                engine.forward_backward([(x, where)])
            found[where] = (str(caught.value), caught.value.hint)
        with pytest.raises(OutOfMemory) as caught:
            engine.evaluate([(x, "forward")])
        found["evaluation"] = (str(caught.value), caught.value.hint)
        engine.forward_backward([(x, "")])
        optimizer.hungry = True
        with pytest.raises(OutOfMemory) as caught:
            engine.step()
        found["optimizer step"] = (str(caught.value), caught.value.hint)
    return found


def test_each_phase_is_named_with_holders_and_remedies(ranks: RankPools) -> None:
    for rank, found in enumerate(ranks(2, starve, Plan(zero=2))):
        for name, (message, hint) in found.items():
            assert message.startswith(f"Rank {rank} ran out of memory on cpu in {name}. Held there: "), message
            # 2 x (600 x 600 + 600) float32 are 2.7 MiB: gathered, or over two ranks half of it.
            parameters = "parameters 1 MiB, gradients 1 MiB" if name == "optimizer step" else "parameters 3 MiB"
            assert "optimizer state 3 MiB" in message and parameters in message and "buffers 1 MiB" in message
            assert "allocate memory" in message
            order = ["batch.micro_batch", "plan.recompute=blocks", "plan.zero=3", "plan.offload=optimizer"]
            places = [hint.index(each) for each in order]
            assert places == sorted(places)


def test_only_remedies_that_are_left_are_given(ranks: RankPools) -> None:
    hint = ranks(1, starve, Plan(zero=3, recompute="blocks", offload="optimizer"))[0]["forward"][1]
    assert hint == "In this order: a smaller batch.micro_batch with more batch.accumulation; plan.offload=parameters."


def test_blocks_that_are_left_alone_are_a_remedy(ranks: RankPools) -> None:
    hint = ranks(1, starve, Plan(zero=3, recompute="blocks", recompute_every=2, offload="optimizer"))[0]["forward"][1]
    assert "plan.recompute_every=1; plan.offload=parameters." in hint


def other_errors() -> None:
    with Mesh.from_env(Plan()) as mesh:
        model = parallelize(nn.Linear(2, 2), mesh, Plan())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for error in (RuntimeError("shapes differ"), ValueError("out of memory")):
            with pytest.raises(type(error), match=str(error)), phase("forward", model, optimizer):
                raise error
        for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not enough memory")):
            with pytest.raises(OutOfMemory, match="in forward"), phase("forward", model, optimizer):
                raise error


def test_other_errors_pass(ranks: RankPools) -> None:
    ranks(1, other_errors)


def test_only_what_is_on_the_device_is_counted() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight.grad = torch.ones(4, 4)
    optimizer.state[model.weight]["elsewhere"] = torch.ones(100, device="meta")
    found = held_bytes(model, optimizer, torch.device("cpu"))
    assert found == {"parameters": 80, "gradients": 64, "optimizer state": 0, "buffers": 0}
    assert held_bytes(model, optimizer, torch.device("meta"))["optimizer state"] == 400
