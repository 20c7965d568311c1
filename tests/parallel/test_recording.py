"""A recording holds each storage no longer than it is needed, and runs no operation that nobody needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainfleet.parallel.recorder import recording
from trainfleet.parallel.recording import Recording, View, run_steps


def recorded(build: Any) -> tuple[Recording, list[int]]:
    """The recording of `build`, and the storages of the tensors it returns."""
    with recording() as recorder:
        made = build()
    views = [recorder.view(tensor) for tensor in made]
    finished = recorder.finish()
    return finished, [view.storage for view in views if view]


class Watched:
    """Counts calls and the storages alive at once."""

    def __init__(self, finished: Recording) -> None:
        self.calls: list[str] = []
        for step in finished.steps:
            step.run = self._counted(step.run)  # type: ignore[union-attr]

    def _counted(self, run: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(str(run))
            return run(*args, **kwargs)

        return call


def values(finished: Recording, wanted: list[int]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}

    def receive(storage: int, memory: torch.UntypedStorage) -> None:
        found[storage] = torch.empty(0).set_(memory).tolist()  # type: ignore[call-overload]

    run_steps(finished.steps, finished.num_bytes, wanted, receive)
    return found


def test_what_is_overwritten_is_not_computed() -> None:
    def build() -> list[torch.Tensor]:
        tensor = torch.ones(4)
        tensor.mul_(3)
        tensor.zero_()
        tensor.add_(2)
        return [tensor]

    finished, (storage,) = recorded(build)
    watched = Watched(finished)
    assert values(finished, [storage]) == {storage: [2.0] * 4}
    assert watched.calls == ["aten.zero_.default", "aten.add_.Tensor"]


def test_a_write_to_a_part_keeps_the_rest() -> None:
    def build() -> list[torch.Tensor]:
        tensor = torch.ones(4)
        tensor[1:].zero_()
        return [tensor]

    finished, (storage,) = recorded(build)
    assert values(finished, [storage]) == {storage: [1.0, 0.0, 0.0, 0.0]}


def test_what_is_read_before_it_is_overwritten_is_computed() -> None:
    def build() -> list[torch.Tensor]:
        first = torch.full((2,), 3.0)
        second = first * 2
        first.zero_()
        return [first, second]

    finished, (first, second) = recorded(build)
    assert values(finished, [first, second]) == {first: [0.0, 0.0], second: [6.0, 6.0]}


def test_an_overwrite_from_itself_needs_what_was_there() -> None:
    def build() -> list[torch.Tensor]:
        tensor = torch.arange(4.0)
        tensor.copy_(tensor.flip(0))
        torch.mul(tensor, 2, out=tensor)
        return [tensor]

    finished, (storage,) = recorded(build)
    assert values(finished, [storage]) == {storage: [6.0, 4.0, 2.0, 0.0]}


def test_random_numbers_nobody_keeps_are_drawn_all_the_same() -> None:
    def build() -> list[torch.Tensor]:
        torch.rand(5)
        tensor = torch.empty(3).normal_()
        return [tensor.uniform_()]

    torch.manual_seed(2)
    (plain,) = build()
    finished, (storage,) = recorded(build)
    torch.manual_seed(2)
    assert values(finished, [storage]) == {storage: plain.tolist()}


def test_views_need_no_operations() -> None:
    finished, _ = recorded(lambda: [torch.zeros(4, 6).t()[1:].view(5, 2, 2).detach().data.permute(2, 0, 1)])
    assert len(finished.steps) == 1


@pytest.mark.parametrize(
    ("make", "covers"),
    [
        (lambda: torch.empty(4, 6), True),
        (lambda: torch.empty(4, 6).t(), True),
        (lambda: torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (lambda: torch.empty(1).view(1, 1), True),
        (lambda: torch.empty(4, 6)[1:], False),
        (lambda: torch.empty(4, 6)[:3], False),
        (lambda: torch.empty(6).expand(4, 6), False),
        (lambda: torch.empty(24)[::2], False),
    ],
)
def test_only_a_view_of_every_byte_covers_its_storage(make: Any, covers: bool) -> None:
    tensor = make()
    assert View.of(tensor, 0).covers(tensor.untyped_storage().nbytes()) is covers


@pytest.mark.parametrize("make", [lambda: torch.randn(3, 4).t(), lambda: torch.randn(3, dtype=torch.complex64).conj()])
def test_a_view_gives_the_tensor_back(make: Any) -> None:
    tensor = make()
    again = View.of(tensor, 0).on(tensor.untyped_storage())
    assert torch.equal(again, tensor) and again.stride() == tensor.stride() and again.is_conj() == tensor.is_conj()
