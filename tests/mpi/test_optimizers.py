"""Each rule beside torch's optimizer of the same name, over ten steps."""

from __future__ import annotations

import numpy as np
import pytest

from trainfleet.mpi.optimizers import SGD, Adam, AdamW, Momentum

torch = pytest.importorskip("torch", reason="the oracle is torch's optimizers")

PAIRS = {
    "sgd": (SGD(learning_rate=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "decay": (SGD(learning_rate=0.1, weight_decay=0.2), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2)),
    "momentum": (Momentum(learning_rate=0.1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "nesterov": (
        SGD(learning_rate=0.1, momentum=0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
    ),
    "adam": (Adam(learning_rate=0.1, weight_decay=0.1), lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1)),
    "adamw": (
        AdamW(learning_rate=0.1, betas=(0.8, 0.9), weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9), weight_decay=0.3),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_it_is_torchs(name):
    ours, make = PAIRS[name]
    w = np.random.default_rng(0).normal(size=(3, 2))
    twin = torch.tensor(w.copy(), requires_grad=True)
    theirs = make([twin])
    memory = {key: np.zeros_like(w) for key in ours.memories}
    for step in range(1, 11):
        gradient = np.random.default_rng(step).normal(size=w.shape)
        twin.grad = torch.tensor(gradient)
        theirs.step()
        w = ours.update(w, gradient, memory, step)
    np.testing.assert_allclose(w, twin.detach(), rtol=1e-12)
