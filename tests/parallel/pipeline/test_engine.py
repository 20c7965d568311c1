"""Tests of the engine of pipelines: what its ranks tell each other. Whole runs: tests/cluster/test_pipelines.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import MODELS
from rank_pool import RankPools

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import make_engine, parallelize
from trainfleet.parallel.spread import num_parameters
from trainfleet.plan import LossScale, Plan

CASE = MODELS["recurrent"]
"""Tied at both ends, and of micro-batches of many lengths."""


def results(plan: Plan) -> dict[str, Any]:
    """What the ranks know after a step, an evaluation, a call of the model, and a step that overflows."""
    torch.set_num_threads(1)
    with Mesh.from_env(plan) as mesh:
        batches = [CASE.micro_batch(0, i) for i in range(5)]
        model = parallelize(CASE.build(0), mesh, plan, example=batches[0])
        engine = make_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), CASE.loss_fn)
        found: dict[str, Any] = {"kind": type(engine).__name__, "parameters": num_parameters(model)}
        found["loss"] = engine.forward_backward(batches[:3])
        found["norm"] = engine.clip(None)
        found["updated"] = engine.step()
        found["evaluation"] = engine.evaluate(iter(batches[3:]))
        found["divisor"] = engine.state()["engine"].state_dict()["step_divisor"]
        model.eval()
        found["output"] = model(batches[4]["input"])
        return found


def test_all_ranks_know_what_one_process_knows(ranks: RankPools) -> None:
    (alone,) = ranks(1, results, Plan())
    both = ranks(2, results, Plan(pp=2))
    assert [each.pop("kind") for each in (alone, *both)] == ["NativeEngine", "PipelineEngine", "PipelineEngine"]
    for found in both:
        assert found["parameters"] == alone["parameters"]
        assert found["loss"] == alone["loss"]
        assert found["norm"] == pytest.approx(alone["norm"], rel=1e-6)  # the tied matrix counts once
        assert found["updated"]
        assert found["divisor"] == alone["divisor"]
        assert found["evaluation"].weight == alone["evaluation"].weight
        assert found["evaluation"].total == pytest.approx(alone["evaluation"].total, rel=1e-6)
        assert torch.allclose(found["output"], alone["output"], atol=1e-6)
    assert torch.equal(both[0]["output"], both[1]["output"])


def overflowed() -> list[Any]:
    plan = Plan(pp=2, precision="fp16", loss_scale=LossScale(initial=2.0**40))
    with Mesh.from_env(plan) as mesh:
        model = parallelize(CASE.build(0), mesh, plan, example=CASE.micro_batch(0, 0))
        engine = make_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), CASE.loss_fn)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        engine.forward_backward([CASE.micro_batch(0, i) for i in range(2)])
        updated = engine.step()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return [updated, same, engine.loss_scale]  # type: ignore[attr-defined]


def test_an_overflow_in_one_stage_makes_all_skip(ranks: RankPools) -> None:
    assert ranks(2, overflowed) == [[False, True, 2.0**39]] * 2


def too_few() -> None:
    plan = Plan(pp=2, schedule="dualpipev")
    with Mesh.from_env(plan) as mesh:
        model = parallelize(CASE.build(0), mesh, plan, example=CASE.micro_batch(0, 0))
        engine = make_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), CASE.loss_fn)
        with pytest.raises(PlanError, match=r"has 3 micro-batches, but .* at least one for each of its 4 stages"):
            engine.forward_backward([CASE.micro_batch(0, i) for i in range(3)])


def test_a_step_with_too_few_micro_batches_is_refused_on_every_rank(ranks: RankPools) -> None:
    ranks(2, too_few)
