"""A region computes with pieces and plain tensors together, and whole where torch cannot split."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from rank_pool import RankPools
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainfleet.errors import PlanError
from trainfleet.mesh import Mesh
from trainfleet.parallel import parallelize
from trainfleet.plan import Plan


class Odd(nn.Module):
    """A perceptron that does `between` with what lies between its layers."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.norm = nn.LayerNorm(12)
        self.register_buffer("table", torch.arange(12.0))
        self.between = between

    def forward(self, x: Tensor, scale: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.between(self, self.up(x)) * scale["by"]
        return self.down(y), {"inner": y, "count": torch.ones(2)}


def plain(module: nn.Module, y: Tensor) -> Tensor:
    return y + torch.arange(12.0) * module.table


def cannot_be_split(module: nn.Module, y: Tensor) -> Tensor:
    return y + torch.cumsum(y, -1) + torch.histc(y.detach(), 3).sum() + y.unflatten(-1, (3, 4)).flip(-1).flatten(-2)


def into_a_plain_buffer(module: nn.Module, y: Tensor) -> Tensor:
    kept = torch.zeros(4, 12)
    kept[:, :] = y
    kept += y
    kept[1:].mul_(module.norm(y)[1:])
    return kept


def random(module: nn.Module, y: Tensor) -> Tensor:
    return y * torch.rand_like(y) + nn.functional.alpha_dropout(y, 0.2, True)


def reads_numbers(module: nn.Module, y: Tensor) -> Tensor:
    return y * 2 if y.sum().item() > 0 and bool((y > -100).all()) else y * y.max()


BETWEEN = [plain, cannot_be_split, into_a_plain_buffer, random, reads_numbers]


def run(between: Callable[..., Tensor], tp: int) -> list[Tensor]:
    with Mesh.from_env(Plan(tp=tp)) as mesh:
        torch.manual_seed(0)
        model = parallelize(Odd(between), mesh, Plan(tp=tp))
        torch.manual_seed(1)
        x = torch.randn(4, 6, requires_grad=True)
        by = torch.randn(12, requires_grad=True)
        out, more = model(x, {"by": by})
        assert not any(isinstance(each, DTensor) for each in (out, *more.values()))
        (out.square().sum() + more["inner"].sum()).backward()
        gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        return [out.detach(), more["inner"].detach(), x.grad, by.grad, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("between", BETWEEN)
def test_whatever_lies_between_the_layers_the_whole_is_right(ranks: RankPools, between: Callable[..., Tensor]) -> None:
    (alone,) = ranks(1, run, between, 1)
    for found in ranks(2, run, between, 2):
        for one, other in zip(alone, found, strict=True):
            torch.testing.assert_close(other, one, rtol=2e-5, atol=1e-5)


def in_place(module: nn.Module, y: Tensor) -> Tensor:
    y = y.clone()
    return y.uniform_()


def refused() -> None:
    with Mesh.from_env(Plan(tp=2)) as mesh, pytest.raises(PlanError, match=r"calls uniform_ on a tensor .*tp_whole"):
        parallelize(Odd(in_place), mesh, Plan(tp=2))(torch.ones(4, 6), {"by": torch.ones(12)})


def test_what_cannot_be_done_in_place_is_refused_with_the_remedy(ranks: RankPools) -> None:
    ranks(2, refused)


class Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def said() -> list[str]:
    notes, logger = Notes(), logging.getLogger("trainfleet.parallel.tensor")
    logger.addHandler(notes)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with Mesh.from_env(Plan(tp=2)) as mesh:
            model = parallelize(nn.Sequential(nn.Linear(6, 6), nn.Sequential(Odd(cannot_be_split))), mesh, Plan(tp=2))
            for _ in range(2):
                model[1][0](torch.ones(4, 6), {"by": torch.ones(12)})
    finally:
        logger.removeHandler(notes)
        logger.setLevel(level)
    return notes.lines


def test_what_is_split_and_what_is_not_is_said_once(ranks: RankPools) -> None:
    first, *others = ranks(2, said)[0]
    assert (
        first
        == "Tensor parallel over 2 ranks: 68 % of the parameters are split, in 1.0 (from structure); whole on each: 0."
    )
    assert others and all("in 1.0 is computed whole by each rank" in line for line in others)
    assert len(others) == len(set(others))


def gradient_of_a_gradient() -> str:
    with Mesh.from_env(Plan(tp=2)) as mesh:
        torch.manual_seed(0)
        model = parallelize(Odd(plain), mesh, Plan(tp=2))
        x = torch.randn(4, 6, requires_grad=True)
        out, _ = model(x, {"by": torch.ones(12)})
        try:
            torch.autograd.grad(out.sum(), x, create_graph=True)
        except PlanError as exc:
            return str(exc)
        return ""


def test_a_gradient_of_a_gradient_is_refused(ranks: RankPools) -> None:
    for said in ranks(2, gradient_of_a_gradient):
        assert "plan.tp splits, which cannot be done" in said
