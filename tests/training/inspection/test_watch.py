"""What is seen of a forward and a backward, and what is left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn

from trainfleet.training.inspection.watch import Watch


class Chain(nn.Module):
    """Calls its parts in turn; `between` stands for code of its own."""

    def __init__(self, *parts: nn.Module, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = self.between(part(x))
        return x


class Gives(nn.Module):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(x)


def watched(
    model: nn.Module, x: Tensor, loss: Callable[[Any], Tensor] = lambda out: out.sum(), **batch: Tensor
) -> Watch:
    watch = Watch(model)
    with watch:
        total = watch.loss_function(lambda out, batch: loss(out), one_by_one=False)(model(x), batch)
        total.backward()
    return watch


def first(watch: Watch) -> tuple[str, str, str | None, str | None]:
    root = watch.losses[0].root
    return root.place, root.module, root.after, root.before


def nan_in(x: Tensor) -> Tensor:
    return x / (x * 0)


X = torch.ones(2, 3)


def test_the_innermost_module_is_named_and_those_behind_it_are_not() -> None:
    model = Chain(nn.Linear(3, 3), Chain(nn.Linear(3, 3), Gives(nan_in)), nn.Linear(3, 3), nn.Identity())
    assert first(watched(model, X)) == ("output", "parts.1.parts.1", None, None)


def test_code_lies_between_what_was_called_before_and_after() -> None:
    calls = iter([lambda x: x, nan_in, lambda x: x])
    model = Chain(*(nn.Linear(3, 3) for _ in range(3)), between=lambda x: next(calls)(x))
    assert first(watched(model, X)) == ("code", "", "parts.1", "parts.2")
    model = Chain(nn.Linear(3, 3), Chain(nn.Linear(3, 3), between=nan_in))
    assert first(watched(model, X)) == ("code", "parts.1", "parts.1.parts.0", None)


def test_masks_and_what_is_healed_are_nobodys_fault() -> None:
    mask = torch.tensor([0.0, -math.inf, 0.0])
    heals = Gives(lambda x: torch.nan_to_num(x))
    model = Chain(
        Gives(lambda x: x / 0),
        heals,
        Gives(lambda x: (x + mask, mask)),
        Gives(lambda both: torch.softmax(both[0], -1)),
        Gives(nan_in),
    )
    assert first(watched(model, X.clone().requires_grad_())) == ("output", "parts.4", None, None)


def test_infinities_are_followed_to_where_they_became_nan() -> None:
    model = Chain(nn.Linear(3, 3), Gives(lambda x: x.abs() / 0), Gives(torch.relu), nn.LayerNorm(3))
    watch = watched(model, X)
    assert first(watch)[1] == "parts.1" and watch.losses[0].first_nan.module == "parts.3"


def test_a_batch_that_only_the_loss_reads_is_blamed_where_the_output_is_finite() -> None:
    bad = torch.tensor([1.0, math.nan])
    watch = watched(nn.Linear(3, 3), X, lambda out: out.sum() * bad.sum(), target=bad)
    assert first(watch)[0] == "batch" and watch.losses[0].root.tensor == "batch['target']"
    assert first(watched(nn.Linear(3, 3), X, lambda out: out.sum() * math.inf)) == ("loss", "", None, None)


def test_changes_in_place_and_tied_weights_compute_what_they_did() -> None:
    torch.manual_seed(0)
    tied = nn.Linear(3, 3)
    model = Chain(tied, nn.ReLU(inplace=True), nn.Linear(3, 3), Gives(lambda x: x.mul_(2)), tied, nn.Tanh())
    model(X).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with Watch(model):
        model(X).sum().backward()
    assert all(torch.equal(p.grad, was) for p, was in zip(model.parameters(), plain, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


def test_an_error_of_the_watch_is_a_warning_and_the_step_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"x": x, "y": Breaks()}

    class Breaks:
        shape = (1,)
        dtype = torch.float32

        @property
        def __class__(self) -> Any:
            raise RuntimeError("broken")

    model = Odd()
    with Watch(model):
        assert torch.equal(model(X)["x"], X)
    assert "it is not looked at further" in caplog.text


def test_tallies_are_kept_by_module_in_the_order_of_computation() -> None:
    model = Chain(nn.Linear(3, 3), nn.ReLU())
    watch = Watch(model, tallies=True)
    with watch:
        model(X).sum().backward()
    assert list(watch.tallies) == ["parts.0", "parts.1", ""]
    relu = watch.tallies["parts.1"]
    assert relu.outputs.count == 6 and relu.gradients.mean == 1.0
    assert relu.outputs.share_of_zeros == int((model(X) == 0).sum()) / 6
