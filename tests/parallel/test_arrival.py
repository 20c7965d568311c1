"""Batches prepared on the device train as those that were prepared before; what is drawn there is the step's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.errors import DataError
from trainfleet.loss import LossSum
from trainfleet.mesh import Mesh
from trainfleet.parallel import make_engine, parallelize
from trainfleet.plan import Plan

STEPS, ACCUMULATION = 2, 2


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def micro_batch(number: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(number)
    return {"input": torch.randint(0, 256, (4, 6), generator=drawn, dtype=torch.uint8), "target": torch.arange(4) % 3}


def cast(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "input": batch["input"].float() / 255}


def jittered(batch: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
    """Draws where it trains, and only there."""
    batch = cast(batch)
    return {**batch, "input": batch["input"] + torch.randn(4, 6)} if training else batch


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> LossSum:
    return LossSum(nn.functional.cross_entropy(output, batch["target"], reduction="sum"), len(output))


def weights_after(plan: Plan, prepare: Any, cast_before: bool = False) -> tuple[dict[str, Tensor], LossSum]:
    """Of a run on this rank's micro-batches, and an evaluation after it."""
    torch.set_num_threads(1)
    with Mesh.from_env(plan) as mesh:
        example = cast(micro_batch(0))
        model = parallelize(build(), mesh, plan, example=example if plan.pp > 1 else None)
        engine = make_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, prepare=prepare, seed=3)
        ranks, rank = mesh.data_axes.size, mesh.data_axes.rank
        # Each rank has half of what one process has.
        accumulation = 2 * ACCUMULATION // ranks
        for step in range(STEPS):
            numbers = [(step * accumulation + i) * ranks + rank for i in range(accumulation)]
            batches = [micro_batch(number) for number in numbers]
            engine.forward_backward([cast(batch) for batch in batches] if cast_before else batches)
            engine.step()
        held_out = micro_batch(99)
        found = engine.evaluate([cast(held_out) if cast_before else held_out])
        state: Any = engine.state()["model"].state_dict()
        pieces = {name: torch.as_tensor(getattr(value, "local", value)) for name, value in state.items()}
        return {name: piece for name, piece in pieces.items() if piece.numel()}, found


def equal(ours: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Of all that this rank has."""
    return len(ours) > 0 and all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.mark.parametrize("plan", [Plan(), Plan(zero=3), Plan(pp=2)], ids=str)
def test_a_cast_on_the_device_is_that_of_batches_cast_before(ranks: RankPools, plan: Plan) -> None:
    n = 1 if plan == Plan() else 2
    for (ours, evaluated), (others, expected) in zip(
        ranks(n, weights_after, plan, cast), ranks(n, weights_after, plan, None, True)
    ):
        assert equal(ours, others) and evaluated == expected


def test_what_is_drawn_on_arrival_is_the_same_on_one_and_two_ranks_and_in_stages(ranks: RankPools) -> None:
    ((alone, evaluated),) = ranks(1, weights_after, Plan(), jittered)
    ((plain, _),) = ranks(1, weights_after, Plan(), cast)
    assert not equal(alone, plain)
    for weights, found in ranks(2, weights_after, Plan(), jittered):
        assert all(torch.allclose(weights[k], alone[k], atol=1e-6) for k in weights)
        assert found.mean == pytest.approx(evaluated.mean, rel=1e-5)
    for weights, found in ranks(2, weights_after, Plan(pp=2), jittered):
        assert equal(weights, alone)
        assert found.mean == pytest.approx(evaluated.mean, rel=1e-6)


def no_batch(batch: Any) -> None:
    return None


def test_a_function_that_forgets_to_return_is_named() -> None:
    with pytest.raises(DataError, match="returned None; it must return the batch"):
        weights_after(Plan(), no_batch)
