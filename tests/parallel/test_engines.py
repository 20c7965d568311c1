"""The engine that a plan asks for is made; cut micro-batches count as themselves on any number of ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from models import MODELS
from oracle import whole
from rank_pool import RankPools

from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, make_engine, parallelize
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case
from trainfleet.training.proof.trace import trace
from trainfleet.training.proof.verdict import Trace, compare

TRANSFORMER = MODELS["transformer"]


def parameters_after(steps: int, plan: Plan) -> list[torch.Tensor]:
    with Mesh.from_env(plan) as mesh:
        model = parallelize(TRANSFORMER.build(0), mesh, plan)
        engine = make_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), TRANSFORMER.loss_fn)
        assert isinstance(engine, NativeEngine)
        for step in range(steps):
            engine.forward_backward([TRANSFORMER.micro_batch(0, step)])
            engine.step()
        return [whole(parameter) for parameter in model.parameters()]


def test_a_micro_batch_in_parts_trains_as_it_does_whole() -> None:
    pairs = zip(parameters_after(3, Plan(microbatches=2)), parameters_after(3, Plan()), strict=True)
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in pairs)


def traced(case: Case, plan: Plan) -> Trace:
    with Mesh.from_env(plan) as mesh:
        return trace(case, plan, mesh)


def dropped_case(accumulation: int) -> Case:
    def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)

    return Case(
        build=lambda: TRANSFORMER.build(0, dropout=0.1),
        loss_fn=TRANSFORMER.loss_fn,
        micro_batch=lambda number: TRANSFORMER.micro_batch(0, number),
        optimizer=optimizer,
        accumulation=accumulation,
    )


def traced_on_a_rank(plan: Plan) -> Trace:
    return traced(dropped_case(2), plan)


def test_parts_have_the_random_numbers_of_one_process_on_any_number_of_ranks(ranks: RankPools) -> None:
    plan = Plan(microbatches=2)
    alone = traced(dropped_case(4), plan)
    verdict = compare(alone, ranks(2, traced_on_a_rank, plan)[0], "fp32")
    assert verdict.holds, str(verdict)
    other = traced(replace(dropped_case(4), seed=1), plan)
    assert not compare(alone, other, "fp32").holds
