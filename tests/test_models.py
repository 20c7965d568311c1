"""The five models of the parity tests are what they are said to be, and they learn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the models are torch modules")
sys.path.append(str(Path(__file__).parent))

from models import MODELS, Case  # noqa: E402

from trainfleet.batch import call_with_batch  # noqa: E402
from trainfleet.loss import LossSum  # noqa: E402
from trainfleet.parallel.blocks import find_blocks  # noqa: E402
from trainfleet.parallel.shard import shared_parameters  # noqa: E402

cases = pytest.mark.parametrize("case", MODELS.values(), ids=MODELS.keys())


def loss_of(case: Case, model: Any, batch: Any) -> LossSum:
    return LossSum.of(case.loss_fn(call_with_batch(model, batch), batch))


def train(case: Case, model: Any, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        loss = loss_of(case, model, case.micro_batch(0, step))
        (loss.total / loss.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.total.detach() / loss.weight))
    return losses


@cases
def test_the_model_learns_its_task(case: Case) -> None:
    losses = train(case, case.build(0), 200)
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


@cases
def test_equal_seeds_give_equal_models_and_data_and_unequal_ones_do_not(case: Case) -> None:
    one, same, other = (dict(case.build(seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    model = case.build(1).eval()
    with torch.no_grad():
        loss, again, later = (loss_of(case, model, case.micro_batch(*at)).mean for at in ((0, 3), (0, 3), (0, 4)))
    assert loss == again != later


@cases
def test_building_leaves_the_generator_of_torch_alone(case: Case) -> None:
    before = torch.get_rng_state()
    case.build(5)
    case.micro_batch(5, 5)
    assert torch.equal(before, torch.get_rng_state())


@cases
def test_the_model_has_blocks_to_shard_and_recompute(case: Case) -> None:
    assert len(find_blocks(case.build(0))) >= 2


@cases
def test_no_gradient_is_mere_rounding(case: Case) -> None:
    model = case.build(0)
    for i in range(3):
        loss_of(case, model, case.micro_batch(0, i)).total.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert min(norms.values()) > 1e-4 * max(norms.values()), norms


def test_each_model_holds_what_it_is_there_for() -> None:
    built = {name: case.build(0) for name, case in MODELS.items()}
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in built["convolutional"].modules())
    assert built["recurrent"].head.weight is built["recurrent"].embedding.weight
    parameters = list(built["scalars"].parameters())
    assert {(p.ndim == 0, p.requires_grad) for p in parameters} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    train(MODELS["scalars"], built["scalars"], 1)
    model = MODELS["scalars"].build(0)
    loss_of(MODELS["scalars"], model, MODELS["scalars"].micro_batch(0, 0)).total.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {"unused.weight", "unused.bias", "unused_scalar"}
    matcher = built["own_loss"]
    assert len(shared_parameters(matcher, find_blocks(matcher))) == 2


def test_micro_batches_of_token_models_weigh_unequally() -> None:
    for name in ("transformer", "recurrent"):
        case = MODELS[name]
        model = case.build(0)
        weights = {float(loss_of(case, model, case.micro_batch(0, i)).weight) for i in range(8)}
        assert len(weights) > 2, name


def test_dropout_is_drawn_only_where_asked_for() -> None:
    case = MODELS["transformer"]
    batch = case.micro_batch(0, 0)
    for dropout, differs in ((0.0, False), (0.5, True)):
        model = case.build(0, dropout=dropout)
        with torch.no_grad():
            first, second = (loss_of(case, model, batch).mean for _ in range(2))
        assert (first != second) == differs
