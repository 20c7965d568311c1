"""parallelize: one order, equal models on all ranks, and refusals before anything is changed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from oracle import whole
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize
from trainfleet.parallel.apply import take_equal_parameters
from trainfleet.parallel.deferred import deferred
from trainfleet.plan import Plan

ALL_PLANS = [Plan(zero=zero, recompute=how) for zero in (0, 1, 2, 3) for how in ("none", "blocks")]


class Model(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)) for _ in range(2))
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + self.gain * block(x)
        return x


def square(output: Tensor, batch: Tensor) -> Tensor:
    return output.square().mean()


def trained(model: nn.Module, rank: int) -> list[Tensor]:
    engine = NativeEngine(model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3), square)
    for step in range(3):
        engine.forward_backward([torch.randn(4, 5, generator=torch.Generator().manual_seed(2 * step + rank))])
        engine.step()
    return [*(whole(parameter) for parameter in model.parameters()), *(b.clone() for b in model.buffers())]


def deferred_and_plain() -> list[str]:
    unlike = []
    for plan in (*ALL_PLANS, Plan(zero=3, offload="parameters"), Plan(zero=2, precision="bf16")):
        with Mesh.from_env(plan) as mesh:
            found = []
            for build in (Model, lambda: deferred(Model)):
                torch.manual_seed(3)
                found.append(trained(parallelize(build(), mesh, plan), mesh.rank))
            if not all(map(torch.equal, *found)):
                unlike.append(str(plan))
    return unlike


def test_a_deferred_model_trains_as_a_plain_one(ranks: RankPools) -> None:
    assert ranks(2, deferred_and_plain) == [[], []]


# ── equal models ──────────────────────────────────────────────────────────────────────────────────────────────────


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def seeds_differ(zero: int) -> list[Any]:
    records = Records()
    logging.getLogger("trainfleet.parallel.apply").addHandler(records)
    with Mesh.from_env(Plan(zero=zero)) as mesh:
        torch.manual_seed(mesh.rank)
        model = Model()
        with torch.no_grad():
            model.stem.weight = nn.Parameter(torch.randn(5, 6).T)  # not contiguous
            model.mask.logical_xor_(torch.tensor(mesh.rank == 1))
        torch.manual_seed(0)
        first = Model()
        first_stem = torch.randn(5, 6).T
        parallelize(model, mesh, Plan(zero=zero))
    logging.getLogger("trainfleet.parallel.apply").removeHandler(records)
    names = {name: whole(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    expected = {**dict(first.named_parameters()), **dict(first.named_buffers()), "stem.weight": first_stem}
    return [[name for name in names if not torch.equal(names[name], expected[name])], records.said]


def test_ranks_with_other_seeds_begin_as_rank_0(ranks: RankPools) -> None:
    for zero in (0, 3):
        (first, said), (second, also) = ranks(2, seeds_differ, zero)
        assert first == second == []
        assert len(said) == 1 and "first in blocks.0.0.bias" in said[0] and also == []


def odd_rank(kind: str) -> str:
    with Mesh.from_env(Plan()) as mesh:
        torch.manual_seed(mesh.rank if kind == "seed" else 0)
        odd = mesh.rank == mesh.world_size - 1
        model = deferred(Model) if kind == "seed" else Model(width=8 if kind == "shape" and odd else 6)
        if odd and kind == "name":
            model.extra = nn.Linear(1, 1)
        if odd and kind == "frozen":
            model.stem.bias.requires_grad_(False)
        if odd and kind == "dtype":
            model.blocks.double()
        with pytest.raises(PlanError) as caught:
            parallelize(model, mesh, Plan())
        return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("name", "extra.bias is on only one of ranks 0 and 2."),
        ("shape", "blocks.0.0.bias is trained float32 [6] on rank 0 and trained float32 [8] on rank 2."),
        ("frozen", "stem.bias is trained float32 [6] on rank 0 and fixed float32 [6] on rank 2."),
        ("dtype", "blocks.0.0.bias is trained float32 [6] on rank 0 and trained float64 [6] on rank 2."),
        ("seed", "Ranks 0 and 1 would fill the deferred model from different random numbers."),
    ],
)
def test_models_that_are_not_alike_are_a_sentence_on_all_ranks(ranks: RankPools, kind: str, message: str) -> None:
    for found in ranks(3, odd_rank, kind):
        assert message in found, found


def nothing_to_exchange() -> bool:
    with Mesh.from_env(Plan()) as mesh:
        model = Model()
        version = model.stem.weight._version
        take_equal_parameters(model, mesh.data_axes)
        return model.stem.weight._version == version


def test_equal_models_are_left_alone(ranks: RankPools) -> None:
    assert ranks(2, nothing_to_exchange) == [True, True]


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(build: Any, plan: Plan) -> list[Any]:
    with Mesh.from_env(Plan()) as mesh:
        torch.manual_seed(0)
        model = build()
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(PlanError) as caught:
            parallelize(model, mesh, plan)
        unchanged = before == {name: type(module) for name, module in model.named_modules()}
        return [str(caught.value), unchanged and not any("forward" in vars(module) for module in model.modules())]


def frozen() -> nn.Module:
    return Model().requires_grad_(False)


def narrow() -> nn.Module:
    return Model().half()


def sparse() -> nn.Module:
    return nn.Sequential(nn.Embedding(3, 3, sparse=True), nn.BatchNorm1d(3))


def unsynchronisable() -> nn.Module:
    model = Model()
    model.norm = nn.InstanceNorm1d(3, track_running_stats=True)
    return model


def without_blocks() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize(
    ("build", "plan", "message"),
    [
        (frozen, Plan(), "Model has no parameter that requires a gradient"),
        (narrow, Plan(precision="fp16"), "Parameter gain is float16"),
        (sparse, Plan(), "0 is a Embedding with sparse=True"),
        (unsynchronisable, Plan(precision="bf16"), "norm (InstanceNorm1d) keeps statistics over its instances"),
        (without_blocks, Plan(recompute="blocks"), "Sequential has no repeated modules"),
        (Model, Plan(entry_points=("generate",)), "plan.entry_points names 'generate', but Model has no such method"),
        (Model, Plan(blocks=("Layer",)), "plan.blocks names 'Layer'"),
        (Model, Plan(zero=1, dp_shard=3), "does not divide the 2 processes"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_changed(
    ranks: RankPools, build: Any, plan: Plan, message: str
) -> None:
    for said, unchanged in ranks(2, refused, build, plan):
        assert message in said and unchanged


def again() -> str:
    with Mesh.from_env(Plan()) as mesh:
        model = parallelize(Model(), mesh, Plan())
        with pytest.raises(PlanError) as caught:
            parallelize(model, mesh, Plan())
        return str(caught.value)


def test_a_spread_model_is_not_spread_again(ranks: RankPools) -> None:
    assert "This Model is spread already" in ranks(1, again)[0]
