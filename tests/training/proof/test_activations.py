"""What modules give is recorded once, by the number of the micro-batch in the step of all ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

from trainfleet.training.proof.activations import Activations  # noqa: E402
from trainfleet.training.proof.verdict import is_activation  # noqa: E402


class Twice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.rare = torch.nn.Linear(2, 2)

    def forward(self, x: Any) -> Any:
        y = checkpoint(self.layer, self.layer(x), use_reentrant=False)
        return (y, self.rare(y)) if x.sum() > 0 else (y, y)


def test_outputs_have_the_names_of_micro_batch_module_and_call() -> None:
    model = Twice()
    with Activations(model) as watched:
        for sign in (1, -1, 1, -1):  # two micro-batches in two parts each, on rank 1 of 2
            model(sign * torch.ones(1, 2))[0].sum().backward()
    model(torch.ones(1, 2))
    found = watched.by_micro_batch(SimpleNamespace(size=2, rank=1), 2, 2)  # type: ignore[arg-type]
    places = [3, 4, 7, 8]
    assert all(is_activation(name) for name in found)
    assert set(found) == {
        *(f"step 1, micro-batch {n}, output of layer (call {k})" for n in places for k in (1, 2)),
        *(f"step 1, micro-batch {n}, output {k} of the model" for n in places for k in (1, 2)),
    }
    first = "step 1, micro-batch 3, output of layer (call 1)"
    assert torch.equal(torch.from_numpy(found[first]), model.layer(torch.ones(1, 2)).detach())
