"""A step that is given up leaves buffers as they were; one that is run again finds them, and generators, as it did."""

from __future__ import annotations

import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from trainfleet.training.watchers.before import Before  # noqa: E402


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


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("fixed", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1  # another tensor each time
        return self.norm(x) * random.random() * np.random.rand() + self.seen


def test_a_step_that_is_given_up_leaves_buffers_as_they_were_whatever_it_did_to_them() -> None:
    model = Keeper()
    before = Before(model, whole=True)
    shared = model.norm.running_mean
    for step in (1, 2, 3):
        held = {name: None if each is None else each.clone() for name, each in _buffers(model).items()}
        before.begin(step, [])
        model(torch.full((4, 3), float("nan") if step != 2 else 1.0))
        if step != 2:
            before.give_up()
            after = _buffers(model)
            assert [name for name in after if after[name] is None] == [name for name in held if held[name] is None]
            assert all(each is None or torch.equal(each, held[name]) for name, each in after.items())
    assert model.norm.running_mean is shared and shared is not None and bool(shared.isfinite().all())
    assert int(model.norm.num_batches_tracked) == 1, "the one step that counted"


class Growing(nn.Module):
    """Its buffer is the same tensor in every step, and larger in each."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.cache.data = torch.cat([self.cache.data, x[:1, 0].detach()])
        return x * len(self.cache)


@pytest.mark.parametrize("whole", [True, False])
def test_a_buffer_that_was_resized_in_place_is_put_back_as_it_was(whole: bool) -> None:
    model = Growing()
    before = Before(model, whole=whole)
    for step in (1, 2, 3):
        before.begin(step, [])
        first = model(torch.ones(2, 1))
    with before.again():
        assert len(model.cache) == 3 and torch.equal(model(torch.ones(2, 1)), first)
    assert len(model.cache) == 4
    before.give_up()
    assert torch.equal(model.cache, torch.tensor([0.0, 1.0, 1.0]))


def test_a_step_that_is_given_up_after_it_was_run_again_leaves_buffers_as_they_were() -> None:
    model = Keeper()
    before = Before(model, whole=True)
    before.begin(1, [])
    model(torch.full((4, 3), float("nan")))
    with before.again():
        model(torch.full((4, 3), float("nan")))
    before.give_up()
    assert model.late is None and torch.equal(model.mean, torch.zeros(3))
    assert model.norm.running_mean is not None and bool(model.norm.running_mean.isfinite().all())


def test_the_second_run_is_the_first() -> None:
    model, x = Drawing(), torch.randn(4, 3)
    before = Before(model)
    for step in range(1, 4):
        before.begin(step, [])
        first = model(x)
    after, drawn, of_numpy = _state(model), random.getstate(), np.random.get_state()[1].copy()
    with before.again() as is_compiled:
        second = model(x)
    assert torch.equal(first, second) and not is_compiled
    assert all(torch.equal(*pair) for pair in zip(after, _state(model), strict=True)) and random.getstate() == drawn
    assert (np.random.get_state()[1] == of_numpy).all()


def test_of_buffers_only_those_are_copied_that_steps_change() -> None:
    model = Drawing()
    before = Before(model)
    for step in range(1, 4):
        before.begin(step, [])
        model(torch.ones(2, 3))
    changing = {before._found()[i][0] for i in before._copies}
    assert changing == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "seen"}
    with before.again():
        model(torch.ones(2, 3))
    before.begin(4, [])
    assert {before._found()[i][0] for i in before._copies} == changing, "what was put back did not change"


def test_a_buffer_that_changes_for_the_first_time_is_named_and_no_other() -> None:
    model = Drawing()
    before = Before(model)
    for step in (1, 2):
        before.begin(step, [])
        model(torch.ones(2, 3))
    with before.again():
        model(torch.ones(2, 3))
    assert before.late() == []
    before.begin(3, [])
    model.fixed += 1
    with before.again():
        pass
    assert before.late() == ["fixed"]


def _buffers(model: nn.Module) -> dict[str, Any]:
    return {f"{path}.{name}": b for path, module in model.named_modules() for name, b in module._buffers.items()}


def _state(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]
