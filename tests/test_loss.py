from __future__ import annotations

import pytest

from trainfleet.loss import LossSum


def test_a_sum_of_sums_weighs_by_tokens_where_a_mean_of_means_does_not():
    short, long = LossSum(2.0, 1), LossSum(3.0, 9)
    assert (short + long).mean == pytest.approx(0.5)
    assert (short.mean + long.mean) / 2 != pytest.approx(0.5)


def test_a_plain_scalar_weighs_one():
    assert LossSum.of(3.0) == LossSum(3.0, 1.0)
    assert LossSum.of(LossSum(3.0, 7)) == LossSum(3.0, 7)


def test_nothing_weighed_has_no_mean_that_divides_by_zero():
    assert LossSum(0.0, 0).mean == 0.0


def test_the_gradient_of_a_sum_reaches_every_part():
    torch = pytest.importorskip("torch", reason="gradients are torch's")
    weight = torch.ones(3, requires_grad=True)
    total = LossSum((weight * 2).sum(), torch.tensor(3.0)) + LossSum((weight[:1] * 4).sum(), 1)
    (total.total / total.weight).backward()
    assert weight.grad is not None and weight.grad.tolist() == [1.5, 0.5, 0.5]
    detached = LossSum(total.total.detach(), total.weight)
    assert detached.mean == pytest.approx(2.5) and isinstance(detached.mean, float)
