"""Modules whose units give nothing are named; what is merely sparse, or no unit at all, is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from trainfleet.events import StepEnded  # noqa: E402
from trainfleet.monitor.anomalies import Finding  # noqa: E402
from trainfleet.plan import Plan  # noqa: E402
from trainfleet.training.watchers.dead_units import DeadUnits  # noqa: E402


class Held:
    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan


def found(
    model: nn.Module,
    batch: Callable[[], Any],
    *,
    steps: int = 40,
    every: int = 2,
    plan: Plan | None = None,
    at: Callable[[int], None] = lambda step: None,
) -> list[Finding]:
    findings: list[Finding] = []
    watch = DeadUnits(findings.append, share=0.5, every=every)
    watch.start(Held(model, plan or Plan()))  # type: ignore[arg-type]
    for step in range(1, steps + 1):
        at(step)
        watch.begin(step, [])
        model(batch()).sum().backward()
        watch.end(
            StepEnded(step=step, loss=1, learning_rate=1, grad_norm=1, samples=1, tokens=1, seconds=1, data_seconds=0)
        )
    watch.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return findings


def mlp(dead: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    kill(model[2], dead)
    return model


def kill(layer: Any, share: float) -> None:
    with torch.no_grad():
        layer.bias[: round(share * len(layer.bias))] = -1e3


def rows() -> Any:
    return torch.randn(32, 8)


def test_a_module_with_dead_units_is_named_once() -> None:
    (finding,) = found(mlp(dead=0.75), rows)
    assert (finding.kind, finding.module) == ("dead_units", "3")
    assert "75% of 3" in finding.what


def test_units_that_live_again_are_told() -> None:
    model = mlp(dead=0.9)

    def revive(step: int) -> None:
        if step == 30:
            with torch.no_grad():
                model[2].bias.zero_()

    begun, over = found(model, rows, steps=80, at=revive)
    assert not begun.is_over and over.is_over and "live again" in over.what


class Functional(nn.Module):
    """Its relu is a function, and some of its pixels are always black."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8 * 36, 2)

    def forward(self, x: Any) -> Any:
        return self.head(torch.relu(self.conv(x)).flatten(1))


def pictures() -> Any:
    x = torch.randn(32, 1, 8, 8)
    x[:, :, 2:] = 0
    return x


def test_a_function_is_seen_by_who_gets_its_output_and_black_pixels_are_no_units() -> None:
    torch.manual_seed(0)
    model = Functional()
    assert found(model, pictures) == []
    kill(model.conv, 0.75)
    (finding,) = found(model, pictures)
    assert finding.module == "the input of head"


def test_channels_of_convolutions_are_units() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    kill(model[0], 0.75)
    (finding,) = found(model, pictures)
    assert finding.module == "1" and "75% of 1" in finding.what


def test_sparse_units_dropout_and_few_dead_ones_are_no_anomaly() -> None:
    torch.manual_seed(0)
    sparse = mlp()
    with torch.no_grad():
        sparse[2].bias -= 0.2
    assert found(sparse, rows) == []
    assert found(mlp(dead=0.3), rows) == []
    assert found(nn.Sequential(nn.Linear(8, 9), nn.Dropout(0.9), nn.Linear(9, 2)), rows) == []


def test_a_compiled_model_is_left_alone() -> None:
    assert found(mlp(dead=0.75), rows, plan=Plan(compile=True)) == []


def test_a_look_that_no_end_followed_leaves_no_hooks() -> None:
    model = mlp()
    watch = DeadUnits([].append, share=0.5, every=1)
    watch.start(Held(model, Plan()))  # type: ignore[arg-type]
    watch.begin(1, [])
    watch.begin(2, [])
    watch.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
