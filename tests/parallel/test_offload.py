"""Offload changes where state and parameters rest, and no number."""

from __future__ import annotations

import functools
from typing import Any

import torch
from models import MODELS
from oracle import hold, whole
from rank_pool import RankPools
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize
from trainfleet.parallel.offload import StateOffload
from trainfleet.parallel.torch_private import with_local
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case

SCALARS = MODELS["scalars"]


def adamw(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=5e-3, eps=1e-3, fused=True)


def case() -> Case:
    return Case(
        build=functools.partial(SCALARS.build, 0),
        loss_fn=SCALARS.loss_fn,
        micro_batch=functools.partial(SCALARS.micro_batch, 0),
        optimizer=adamw,
        accumulation=2,
    )


def steps(plan: Plan) -> list[Tensor]:
    with Mesh.from_env(plan) as mesh:
        model = parallelize(SCALARS.build(0), mesh, plan)
        engine = NativeEngine(model, adamw(model), SCALARS.loss_fn)
        for step in range(5):
            engine.forward_backward([SCALARS.micro_batch(0, 2 * step + mesh.rank)])
            engine.clip(0.5)
            engine.step()
            engine.evaluate([SCALARS.micro_batch(1, step)])
        return [whole(parameter) for parameter in model.parameters()]


def test_the_numbers_are_those_without_offload(ranks: RankPools) -> None:
    plain = ranks(2, steps, Plan(zero=3))[0]
    for offload in ("optimizer", "parameters"):
        assert all(map(torch.equal, plain, ranks(2, steps, Plan(zero=3, offload=offload))[0])), offload
    hold(ranks, 2, case(), [Plan(zero=1, offload="optimizer"), Plan(zero=3, offload="parameters")])


def moved(value: Tensor, device: torch.device) -> Tensor:
    return torch.empty(value.shape, device=device)


def test_state_leaves_after_the_step_and_is_back_before_it(monkeypatch: Any) -> None:
    """The meta device stands for the other memory: what is there has no numbers, so only the moves are seen."""
    parameter = torch.nn.Parameter(torch.ones(3, device="meta"))
    scalar = torch.nn.Parameter(torch.ones((), device="meta"))
    parameter.grad, scalar.grad = torch.ones_like(parameter), torch.ones_like(scalar)
    optimizer = torch.optim.AdamW([parameter, scalar], lr=0.1, foreach=False)
    during: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: during.append("before"))
    offload = StateOffload(optimizer)
    optimizer.register_step_pre_hook(
        lambda *_: during.extend(str(state["exp_avg"].device) for state in optimizer.state.values())
    )
    monkeypatch.setattr(
        "trainfleet.parallel.offload._moved", lambda value, device: torch.empty(value.shape, device=device)
    )
    for _ in range(2):
        optimizer.step()
        assert optimizer.state[parameter]["exp_avg"].device.type == "cpu"
    assert during == ["before", "before", "meta", "meta"]
    offload.close()
    optimizer.state.clear()
    optimizer.step()
    assert optimizer.state[parameter]["exp_avg"].is_meta


def another_piece() -> list[Any]:
    plan = Plan(zero=3)
    with Mesh.from_env(plan) as mesh:
        weight = parallelize(torch.nn.Linear(3, 3), mesh, plan).weight
        assert isinstance(weight, DTensor)
        twin = with_local(weight, torch.zeros_like(weight.to_local()))
        elsewhere = with_local(weight, weight.to_local().to("meta"))
        return [
            tuple(twin.shape) == (3, 3) and twin.placements == weight.placements,
            float(twin.full_tensor().abs().sum()),
            elsewhere.to_local().is_meta and elsewhere.device.type == "meta",
        ]


def test_a_piece_may_rest_on_another_device_than_its_mesh(ranks: RankPools) -> None:
    for found in ranks(2, another_piece):
        assert found == [True, 0.0, True]
