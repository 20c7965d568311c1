"""States under DeepSpeed have the names, shapes and numbers of those under our own engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import MODELS
from rank_pool import RankPools

from trainfleet.deps import installed
from trainfleet.errors import CheckpointError
from trainfleet.mesh import Mesh
from trainfleet.parallel import make_engine, parallelize
from trainfleet.plan import Plan
from trainfleet.state import ShardedArray

pytestmark = pytest.mark.skipif(installed("deepspeed") is None, reason="DeepSpeed is not installed")

CASE = MODELS["transformer"]


def kinds(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: kinds(value) for key, value in state.items()}
    return (state.name, state.global_shape, state.dtype) if isinstance(state, ShardedArray) else type(state).__name__


def shapes_of_states(plan: Plan, steps: int) -> Any:
    with Mesh.from_env(plan) as mesh:
        torch.manual_seed(0)
        model = parallelize(CASE.build(0), mesh, plan)
        engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=1e-3), CASE.loss_fn)
        for step in range(steps):
            engine.forward_backward([CASE.micro_batch(0, step)])
            engine.step()
        return kinds({name: part.state_dict() for name, part in engine.state().items()})


@pytest.mark.parametrize("steps", [0, 1])
def test_states_are_alike_in_all_engines_before_and_after_the_first_step(ranks: RankPools, steps: int) -> None:
    ours = ranks(2, shapes_of_states, Plan(zero=2), steps)[0]
    for zero in (1, 3):
        assert ranks(2, shapes_of_states, Plan(engine="deepspeed", zero=zero), steps)[0] == ours


def refused() -> str:
    plan = Plan(engine="deepspeed", zero=1)
    with Mesh.from_env(plan) as mesh:
        model = parallelize(CASE.build(0), mesh, plan)
        engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=1e-3), CASE.loss_fn)
        state = engine.state()["optimizer"].state_dict()
        with pytest.raises(CheckpointError) as caught:
            engine.state()["optimizer"].load_state_dict({**state, "started": ["head.bias"]})
        return str(caught.value)


def test_parameters_with_unlike_numbers_of_steps_are_refused(ranks: RankPools) -> None:
    assert "has taken other steps of" in ranks(2, refused)[0]
