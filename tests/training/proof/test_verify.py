"""verify says yes to a plan that computes the same, and names the first tensor where one does not."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from models import MODELS  # noqa: E402

from trainfleet.errors import DataError  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402
from trainfleet.training.proof.verify import verify  # noqa: E402


def build(name: str) -> Any:
    return MODELS[name].build(0)


def micro_batch(name: str, number: int) -> Any:
    return MODELS[name].micro_batch(0, number)


def test_a_model_and_its_batches_are_enough() -> None:
    batches = [micro_batch("scalars", number) for number in range(4)]
    verdict = verify(build("scalars"), Plan(zero=3), batches, loss_fn=MODELS["scalars"].loss_fn)
    assert verdict.holds, verdict
    with pytest.raises(DataError, match=r"takes 6 micro-batches \(3 for each of 2 data ranks\), but 4 are given"):
        verify(build("scalars"), Plan(), batches, loss_fn=MODELS["scalars"].loss_fn, accumulation=3)


class Misplaced(torch.nn.Module):
    """Its second layer computes something else on rank 1 of several: a mistake in forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(4, 4), Doubled(4, 4)

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x)).square().mean()


class Doubled(torch.nn.Linear):
    def forward(self, x: Any) -> Any:
        wrong = torch.distributed.is_initialized() and torch.distributed.get_rank() == 1
        return super().forward(x) * (2 if wrong else 1)


def test_a_mistake_in_forward_is_found_at_the_module_that_makes_it() -> None:
    batches = [torch.randn(3, 4, generator=torch.Generator().manual_seed(number)) for number in range(4)]
    verdict = verify(Misplaced, Plan(), batches)
    assert verdict.first is not None
    assert verdict.first.tensor == "step 1, micro-batch 2, output of second"
