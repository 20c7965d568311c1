"""The inputs of recomputed blocks are kept in pieces on tensor-parallel ranks, and gathered as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import MODELS
from rank_pool import RankPools
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import NativeEngine, parallelize, partition
from trainfleet.parallel.partition import kept_in_pieces, partition_inputs
from trainfleet.plan import Plan

CASE = MODELS["transformer"]


def trained(plan: Plan) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Parameters after two steps, and (elements, elements kept here) of each input of a block."""
    found: list[tuple[int, int]] = []
    cut = partition._cut

    def watched(*args: Any) -> Any:
        kept = cut(*args)
        if isinstance(kept, partition._Piece):
            found.append((args[-1].numel(), kept.part.numel()))
        return kept

    partition._cut = watched
    try:
        with Mesh.from_env(plan, device="cpu") as mesh:
            model = parallelize(CASE.build(0, dropout=0.2), mesh, plan)
            engine = NativeEngine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), CASE.loss_fn)
            for step in range(2):
                engine.forward_backward([CASE.micro_batch(0, 2 * step + mesh.data_axes.rank)])
                engine.clip(1.0)
                engine.step()
            full = [getattr(parameter, "full_tensor", lambda p=parameter: p)() for parameter in model.parameters()]
            return [parameter.detach().clone() for parameter in full], found
    finally:
        partition._cut = cut


@pytest.mark.parametrize("more", [{}, {"precision": "bf16"}, {"recompute_budget": 0.5}], ids=str)
def test_training_is_the_same_to_the_bit_and_each_rank_keeps_a_half(ranks: RankPools, more: dict[str, Any]) -> None:
    plan = {"tp": 2, "recompute": "blocks", **more}
    (kept, none), (cut, pieces) = (
        ranks(2, trained, Plan(**plan, activations=where))[0] for where in ("keep", "partition")
    )
    assert all(map(torch.equal, kept, cut))
    assert not none and len(pieces) >= 4  # two blocks, two steps
    assert {(2 * part, whole) for whole, part in pieces} == {(2 * 8 * 16, 2 * 8 * 16)}


def unequal(plan: Plan, length: int) -> list[Tensor]:
    with Mesh.from_env(plan, device="cpu") as mesh:
        torch.manual_seed(0)
        block = nn.Linear(3, 3)
        forward = block.forward

        def recomputed(x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)

        block.forward = recomputed  # type: ignore[method-assign]
        partition_inputs([block], mesh["tp"])
        x = torch.randn(length, 3).t().contiguous().t().requires_grad_()
        (block(x) ** 2).sum().backward()
        with pytest.raises(PlanError, match=r"inputs of a Linear differ between ranks 0 and 1 of plan\.tp"):
            other = nn.Linear(3, 3)
            partition_inputs([other], mesh["tp"])
            other(x.detach().add(mesh["tp"].rank).requires_grad_())
        reference = x.detach().clone().requires_grad_()
        (forward(reference) ** 2).sum().backward()
        assert x.grad is not None and reference.grad is not None
        return [x.grad, reference.grad]


def test_odd_sizes_and_strides_come_back_and_unequal_inputs_are_refused(ranks: RankPools) -> None:
    for found, expected in ranks(2, unequal, Plan(tp=2), 5):
        assert torch.equal(found, expected)


def of_wholes() -> tuple[list[int], list[Tensor]]:
    """Elements kept of what was saved inside a hook of the caller's, and the gradients with it and without."""
    kept: list[int] = []

    def product(whole: DTensor, weight: DTensor) -> Tensor:
        own = whole.to_local()[:, mesh.rank : mesh.rank + 2]  # another on each rank, in the same memory
        return (whole @ weight).square().sum().to_local() + own.square().sum()

    def note(tensor: Tensor) -> Tensor:
        kept.append((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel())
        return tensor

    with Mesh.from_env(Plan(tp=2), device="cpu") as mesh:
        made = [torch.arange(12.0).view(3 + i % 2, 4 - i % 2).requires_grad_() for i in range(4)]
        first, weight, second, other = (
            DTensor.from_local(each, mesh.torch["tp"], [Replicate()], run_check=False) for each in made
        )
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            with kept_in_pieces([first, "no tensor"], mesh["tp"]):
                total = product(first, weight)
            count = list(kept)
        (total + product(second, other)).backward()
        return count, [each.grad for each in made if each.grad is not None]


def test_of_wholes_a_piece_is_kept_and_what_is_plain_goes_where_it_would_have_gone(ranks: RankPools) -> None:
    for kept, (first, weight, second, other) in ranks(2, of_wholes):
        assert 12 in kept and kept.count(12) == 1  # the weight; of the whole, nothing reached the hook around
        assert torch.equal(first, second) and torch.equal(weight, other)
