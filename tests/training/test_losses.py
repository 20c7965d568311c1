"""Losses are sums with a weight; padded and left-out labels do not count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402

from trainfleet.errors import ConfigError, DataError  # noqa: E402
from trainfleet.loss import LossSum  # noqa: E402
from trainfleet.training.losses import cross_entropy, loss_by_name, mse, target_of  # noqa: E402


def test_cross_entropy_is_the_mean_over_the_labels_that_count() -> None:
    logits, labels = torch.randn(4, 7, 5), torch.randint(5, (4, 7))
    labels[1, 3:] = -100
    loss = cross_entropy(logits, {"input": logits, "target": labels})
    assert float(loss.weight) == 24
    assert loss.mean == pytest.approx(float(functional.cross_entropy(logits.flatten(0, 1), labels.flatten())), rel=1e-6)


def test_a_sample_of_weight_0_does_not_count() -> None:
    logits, labels = torch.randn(3, 5), torch.tensor([1, 2, 3])
    padded = cross_entropy(logits, {"target": labels, "weight": torch.tensor([1.0, 1.0, 0.0])})
    assert padded.mean == pytest.approx(cross_entropy(logits[:2], (None, labels[:2])).mean)
    assert float(padded.weight) == 2
    as_third = cross_entropy(logits, (logits, labels, torch.tensor([1.0, 1.0, 0.0])))
    assert as_third.mean == padded.mean and float(as_third.weight) == 2


def test_mse_averages_elements_and_sums_samples() -> None:
    predicted, target = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    loss = mse(predicted, (None, target))
    assert loss.mean == pytest.approx(float(functional.mse_loss(predicted, target)))
    with pytest.raises(DataError, match="must be equal"):
        mse(predicted, (None, target[:, 0]))


@dataclass
class Output:
    loss: Any


@pytest.mark.parametrize("output", [torch.tensor(2.0), Output(torch.tensor(2.0)), {"loss": torch.tensor(2.0)}])
def test_a_model_may_compute_its_own_loss(output: Any) -> None:
    assert LossSum.of(loss_by_name("model")(output, None)).mean == 2.0


def test_targets_are_found_or_their_absence_is_said() -> None:
    assert target_of({"labels": 3}) == 3
    assert target_of((1, 2)) == 2
    with pytest.raises(DataError, match="keys x has no target"):
        target_of({"x": 1})


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="cross_entropy, mse, model"):
        loss_by_name("crossentropy")
