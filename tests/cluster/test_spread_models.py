"""What holds for a spread model beside what it computes: its mesh fits, and it leaves nothing behind."""

from __future__ import annotations

import pytest
from rank_pool import RankPools


def is_freed(zero: int) -> bool:
    """Whether nothing of a model, its optimizer and its engine is left, two steps after which all were let go."""
    import gc
    import weakref

    import torch
    from torch import nn

    from trainfleet import Mesh, NativeEngine, Plan, parallelize

    def train(mesh: Mesh, plan: Plan) -> weakref.ref[nn.Module]:
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        parallelize(model, mesh, plan)
        engine = NativeEngine(model, torch.optim.AdamW(model.parameters()), lambda output, batch: output.mean())
        for _ in range(2):
            engine.forward_backward([torch.ones(2, 4)])
            engine.step()
        return weakref.ref(model[0])

    plan = Plan(zero=zero)
    with Mesh.from_env(plan, device="cpu") as mesh:
        last = train(mesh, plan)
        gc.collect()
        return last() is None


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_model_that_nobody_holds_is_freed(ranks: RankPools, zero: int) -> None:
    assert ranks(2, is_freed, zero) == [True, True]


def refusal() -> str:
    from torch import nn

    from trainfleet import Mesh, Plan, parallelize
    from trainfleet.errors import PlanError

    with Mesh.from_env(device="cpu") as mesh, pytest.raises(PlanError) as raised:
        parallelize(nn.Linear(4, 4), mesh, Plan(zero=2))
    return str(raised.value)


def test_a_mesh_that_shards_nothing_is_refused_for_a_plan_that_shards(ranks: RankPools) -> None:
    for sentence in ranks(2, refusal):
        assert "dp_replicate=1" in sentence and "made with 2" in sentence
        assert "Mesh.from_env(plan)" in sentence
