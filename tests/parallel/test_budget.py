"""A budget leaves as they are the blocks that are dearest to compute again for the bytes that they keep."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

from trainfleet.comm.threads import run_ranks
from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize
from trainfleet.parallel.budget import Budget, choose
from trainfleet.parallel.spread import spread_of
from trainfleet.plan import Plan

CASE = MODELS["transformer"]


def kept(costs: list[tuple[float, float, float]], chosen: tuple[int, ...] | list[int]) -> float:
    return sum(cost[0] if i in chosen else min(cost[:2]) for i, cost in enumerate(costs))


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_spares_the_most_seconds_within_the_budget(seed: int) -> None:
    draw = random.Random(seed)
    costs = [(float(draw.randint(20, 90)), float(draw.randint(1, 10)), draw.randint(1, 9) / 10) for _ in range(7)]
    mean = sum(cost[2] for cost in costs) / 7
    tenths = [round(10 * cost[2] / mean) for cost in costs]
    for part in (0.0, 0.3, 0.5, 0.8, 1.0):
        limit = part * sum(cost[0] for cost in costs)
        found = choose(costs, part)
        subsets = itertools.chain.from_iterable(itertools.combinations(range(7), n) for n in range(8))
        # What a block keeps is rounded up to a thousandth of the room, so what just fits may not be chosen.
        surely = limit - 7 * max(0.0, limit - kept(costs, ())) / 1000 if part < 1 else limit
        fitting = [each for each in subsets if kept(costs, each) <= surely]
        assert not found or kept(costs, found) <= limit * 1.0001
        best = max((sum(tenths[i] for i in each) for each in fitting), default=0)
        assert sum(tenths[i] for i in found) >= best
    assert choose(costs, 0.0) == [] and choose(costs, 1.0) == list(range(7))


def test_of_blocks_that_are_alike_the_later_ones_are_left() -> None:
    assert choose([(100.0, 10.0, 1.0)] * 4, 0.55) == [2, 3]
    assert choose([(100.0, 10.0, 1.0)] * 3 + [(100.0, 10.0, 0.1)], 0.55) == [1, 2]


def test_a_block_whose_recomputing_frees_nothing_is_never_recomputed() -> None:
    assert choose([(10.0, 10.0, 1.0), (100.0, 10.0, 1.0)], 0.1) == [0]


class Wide(nn.Module):
    """Four blocks of which the second keeps eight times what the others keep."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 64)) for width in (64, 1024, 64, 64)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def saved_bytes(run: Any) -> int:
    held: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        if not isinstance(tensor, nn.Parameter) and tensor.ndim == 2 and tensor.shape[0] == 256:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(held.values())


def kept_before_and_after(mesh: Mesh, part: float | None) -> tuple[int, int, Budget | None]:
    """Bytes that a forward keeps before the first step and after it."""
    x = torch.randn(256, 64)
    model = parallelize(Wide(), mesh, Plan(recompute="blocks", recompute_budget=part))
    engine = NativeEngine(
        model, torch.optim.SGD(model.parameters(), lr=0.0), lambda output, batch: output.square().mean()
    )
    first = saved_bytes(lambda: model(x))
    engine.forward_backward([(x, x)])
    engine.step()
    return first, saved_bytes(lambda: model(x)), spread_of(model).budget


def test_the_second_step_keeps_no_more_than_the_budget() -> None:
    plain = saved_bytes(lambda: Wide()(torch.randn(256, 64)))
    with Mesh.from_env(Plan()) as mesh:
        least, again, _ = kept_before_and_after(mesh, None)
        assert least == again < plain / 3
        found = {}
        for part in (0.0, 0.35, 0.6, 1.0):
            first, found[part], budget = kept_before_and_after(mesh, part)
            assert first == least and budget is not None
            measured = [cost.kept_bytes for cost in budget._costs.values()]
            assert measured == [256 * 4 * (64 + width) for width in (64, 1024, 64, 64)]
            assert found[part] <= max(part * plain, least) * 1.001
    # In 0.6 there is no room for the wide block either, so that all others are kept.
    assert least == found[0.0] < found[0.35] == found[0.6] < found[1.0] == plain


def trained(plan: Plan) -> list[Tensor]:
    with Mesh.from_env(plan) as mesh:
        model = parallelize(CASE.build(0, dropout=0.2, depth=4), mesh, plan)
        engine = NativeEngine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), CASE.loss_fn)
        for step in range(3):
            engine.forward_backward([CASE.micro_batch(0, 2 * step), CASE.micro_batch(0, 2 * step + 1)])
            engine.clip(1.0)
            engine.step()
        return [parameter.detach() for parameter in model.parameters()]


def test_numbers_are_those_without_recomputing_to_the_bit() -> None:
    plain = trained(Plan())
    for part in (0.0, 0.5, 1.0):
        assert all(map(torch.equal, plain, trained(Plan(recompute="blocks", recompute_budget=part))))


def test_all_ranks_choose_the_same_from_different_measures() -> None:
    def settled(group: Any) -> list[bool]:
        model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
        budget = Budget(model, 0.55)
        for i, block in enumerate(model):
            cost = budget.cost_of(block)
            # Each rank alone would find another block the dearest.
            cost.kept_bytes, cost.input_bytes, cost.calls = 100, 10, 1
            cost.seconds = 9.0 if i == group.rank else 1.0
        budget.settle(group)
        return [budget.cost_of(block).is_kept for block in model]

    first, second = run_ranks(2, settled)
    assert first == second == [True, True, False, False]
