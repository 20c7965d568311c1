"""Where rounding decides which experts a token goes to, a second run goes where the first went, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_pool import RankPools
from torch import Tensor, nn

from trainfleet.batch import Batch
from trainfleet.parallel import MixtureOfExperts
from trainfleet.parallel.choices import Taking, Telling
from trainfleet.plan import Plan
from trainfleet.training.proof.case import Case
from trainfleet.training.proof.reference import Reference
from trainfleet.training.proof.trace import trace_rank

TOLERANCE = 1e-3
ROW = torch.tensor([[0.5, 0.1, 0.49999, 0.2], [0.9, 0.1, 0.3, 0.2]])
ROUNDED = ROW.clone()
ROUNDED[0, 0], ROUNDED[0, 2] = 0.49999, 0.5


def told(*calls: Any) -> Telling:
    telling = Telling(TOLERANCE)
    with telling:
        for call in calls:
            call(ROW)
    return telling


TAKERS = {
    "topk": lambda rows: rows.topk(2),
    "topk without an order": lambda rows: torch.topk(rows, 2, dim=1, sorted=False),
    "max": lambda rows: rows.max(-1),
    "max that keeps its dimension": lambda rows: rows.max(dim=1, keepdim=True),
    "argmax": lambda rows: (None, rows.argmax(-1)),
}


@pytest.mark.parametrize("name", TAKERS)
def test_a_tie_is_taken_as_it_was_told(name: str) -> None:
    take = TAKERS[name]
    assert not torch.equal(take(ROW)[1], take(ROUNDED)[1]), "rounding decides"
    with Taking(TOLERANCE, told(take).ties()):
        values, indices = take(ROUNDED)
    assert torch.equal(indices, take(ROW)[1])
    if values is not None:
        assert torch.equal(values, ROUNDED.gather(1, indices.view(2, -1)).view(values.shape)), "values are its own"


def test_the_gradient_goes_where_the_value_was_taken() -> None:
    rows = ROUNDED.clone().requires_grad_()
    with Taking(TOLERANCE, told(lambda row: row.topk(1)).ties()):
        rows.topk(1).values.sum().backward()
    assert rows.grad is not None and rows.grad[0].tolist() == [1, 0, 0, 0]


def changed(place: tuple[int, int], value: float) -> Tensor:
    rows = ROW.clone()
    rows[place] = value
    return rows


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(changed((0, 2), 0.6), id="the numbers differ by more than rounding"),
        pytest.param(changed((0, 0), 0.1), id="what was taken is no longer among the largest"),
        pytest.param(changed((0, 1), 0.3) - changed((0, 0), 0.0) * 0.1, id="it is another row"),
        pytest.param(ROW.flip(0), id="rows in another order, and no tie differs"),
        pytest.param(ROW[:, :3], id="of another width"),
        pytest.param(torch.full((2, 4), torch.nan), id="no numbers"),
        pytest.param(torch.empty(0, 4), id="no rows"),
    ],
)
def test_other_choices_are_each_runs_own(rows: Tensor) -> None:
    with Taking(TOLERANCE, told(lambda row: row.topk(2)).ties()):
        found = rows.topk(2)
    assert torch.equal(found[1], rows.topk(2)[1])


def test_only_ties_are_kept_and_by_step() -> None:
    telling = Telling(TOLERANCE)
    with telling:
        ROW.topk(2)
        telling.step = 1
        ROW[1:].topk(2)
        ROW.long().topk(2)
        ROW.topk(2, dim=0)
        ROW.topk(2, largest=False)
    [(kind, ties)] = telling.ties().items()
    assert (kind.step, kind.width, kind.count) == (0, 4, 2) and ties.taken.tolist() == [[0, 2]]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 16)
        self.outer = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.outer(self.inner(x).relu())
        return y


class Mixture(nn.Module):
    """Its router knows few numbers, so that many tokens lie between two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()
        self.experts = MixtureOfExperts(8, 16, 4)
        with torch.no_grad():
            self.experts.router.weight[1] = self.experts.router.weight[0] * (1 + 1e-7)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layers(x)
        return x + self.experts(x)


def build() -> nn.Module:
    torch.manual_seed(0)
    return Mixture()


def micro_batch(number: int) -> Batch:
    draw = torch.Generator().manual_seed(number)
    return torch.randn(3, 16, 8, generator=draw), torch.randn(3, 16, 8, generator=draw)


def squared(output: Tensor, batch: Any) -> Tensor:
    return (output - batch[1]).square().mean()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


CASE = Case(
    build=build,
    loss_fn=squared,
    micro_batch=micro_batch,
    optimizer=adamw,
    steps=1,
    accumulation=2,
    keep_activations=True,
)


def reference() -> Reference:
    return Reference.of(CASE, Plan(), 1)


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_split_layers_send_tokens_where_one_process_does(ranks: RankPools, recompute: Any) -> None:
    expected = ranks(1, reference)[0]
    plan = Plan(tp=2, recompute=recompute, blocks=("Layers", "MixtureOfExperts"))
    verdict = expected.verdict(ranks(2, trace_rank, CASE, plan, expected.ties))
    assert verdict.holds, str(verdict)
    assert "choices, as of experts" in verdict.remarks[0]
    alone = expected.verdict(ranks(2, trace_rank, CASE, plan, {}))
    assert alone.first is not None and "experts" in alone.first.tensor, "rounding decided otherwise"
