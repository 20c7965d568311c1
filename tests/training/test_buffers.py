"""Where a step is given up, buffers are what they were before it."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from trainfleet.training.buffers import Buffers  # noqa: E402


class Keeper(nn.Module):
    """Replaces a buffer, and makes one in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("late", None)

    def forward(self, x: Any) -> Any:
        self.mean = 0.5 * self.mean + x.mean(0)
        self.late = x.mean(0)
        return self.norm(x)


class Held:
    def __init__(self, model: nn.Module) -> None:
        self.model = model


def test_buffers_are_put_back_whatever_the_forward_did_to_them() -> None:
    model, buffers = Keeper(), Buffers()
    buffers.start(Held(model))  # type: ignore[arg-type]
    shared = model.norm.running_mean
    before = None
    for step in (1, 2, 3):
        before = {name: None if each is None else each.clone() for name, each in _buffers(model).items()}
        buffers.begin(step, [])
        model(torch.full((4, 3), float("nan") if step != 2 else 1.0))
        if step != 2:
            buffers.give_up()
            after = _buffers(model)
            assert [name for name in after if after[name] is None] == [name for name in before if before[name] is None]
            assert all(each is None or torch.equal(each, before[name]) for name, each in after.items())
    assert model.norm.running_mean is shared and shared is not None and bool(shared.isfinite().all())
    assert int(model.norm.num_batches_tracked) == 1, "the one step that counted"


def _buffers(model: nn.Module) -> dict[str, Any]:
    return {f"{path}.{name}": b for path, module in model.named_modules() for name, b in module._buffers.items()}
