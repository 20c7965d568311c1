"""The loss and its derivative beside torch's, whole and split by vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.mpi.cross_entropy import cross_entropy, vocabulary_parallel_cross_entropy

LOGITS = np.random.default_rng(0).normal(size=(3, 5, 8)) * 30  # large, so that exp alone would overflow
TARGETS = np.random.default_rng(1).integers(0, 8, (3, 5))


def test_it_is_torchs():
    torch = pytest.importorskip("torch", reason="the oracle is torch's")
    logits = torch.tensor(LOGITS.reshape(-1, 8), requires_grad=True)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(TARGETS.reshape(-1)), reduction="sum")
    expected.backward()
    loss, derivative = cross_entropy(LOGITS, TARGETS)
    assert loss.total == pytest.approx(expected.item()) and loss.weight == 15
    np.testing.assert_allclose(derivative.reshape(-1, 8), logits.grad, atol=1e-14)


def split(group):
    width = 8 // group.size
    part = LOGITS[..., group.rank * width : (group.rank + 1) * width]
    loss, derivative = vocabulary_parallel_cross_entropy(part, TARGETS, group)
    return loss, derivative


@pytest.mark.parametrize("size", [2, 4])
def test_split_by_vocabulary_it_is_the_same_on_every_rank(run, size):
    whole, expected = cross_entropy(LOGITS, TARGETS)
    results = run(size, split)
    assert [loss.total for loss, _ in results] == pytest.approx([whole.total] * size)
    np.testing.assert_allclose(np.concatenate([part for _, part in results], axis=-1), expected, atol=1e-14)
