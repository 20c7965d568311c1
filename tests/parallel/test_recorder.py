"""What a constructor may do while it is recorded, and what it is told when it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainfleet.errors import PlanError
from trainfleet.parallel.recorder import recording

init = nn.init


def record(build: Callable[[], Any]) -> Any:
    with recording() as recorder:
        try:
            return build()
        finally:
            recorder.abandon()


def reads_item(weight: Tensor) -> Any:
    return weight.sum().item()


def reads_bool(weight: Tensor) -> Any:
    return 1 if weight.max() > 0 else 0


def reads_numpy(weight: Tensor) -> Any:
    return weight.detach().numpy().mean()


def reads_list(weight: Tensor) -> Any:
    return weight.tolist()


def selects(weight: Tensor) -> Any:
    return weight[weight > 0]


@pytest.mark.parametrize("read", [reads_item, reads_bool, reads_numpy, reads_list, selects])
def test_reading_a_random_value_is_refused_with_its_line(read: Callable[[Tensor], Any]) -> None:
    before = torch.get_rng_state()
    line = f"{__file__}:{read.__code__.co_firstlineno + 1}"
    with pytest.raises(PlanError, match="Build it for real") as refusal:
        record(lambda: read(nn.Linear(6, 9).weight))
    assert line in str(refusal.value)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_array_read_from_a_deferred_tensor_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        record(lambda: nn.LayerNorm(3).weight.detach().numpy().fill(2))


def test_random_numbers_for_real_tensors_are_refused() -> None:
    given = torch.zeros(3)
    with pytest.raises(PlanError, match="already real"):
        record(lambda: init.normal_(given))
    with pytest.raises(PlanError, match="already real"):
        record(lambda: given.copy_(torch.ones(3)))


def test_values_that_are_not_random_may_be_read() -> None:
    def build() -> list[Any]:
        table = torch.linspace(0, 1, 3)
        table[1] = torch.tensor(4.0)
        rows = torch.nonzero(table > 0.5).flatten()
        return [table.tolist(), table[1].item(), bool(table.any()), rows.tolist(), len(rows), table.numpy().sum()]

    assert record(build) == build()


def test_recorded_tensors_seem_to_live_on_the_cpu() -> None:
    def build() -> Tensor:
        tensor = torch.ones(3)
        assert tensor.device == torch.device("cpu") and tensor.is_cpu and not tensor.is_meta
        assert tensor.cpu() is tensor and tensor.to("cpu") is tensor and tensor.to(torch.zeros(1)) is tensor
        assert tensor.to("cpu", torch.float64).dtype == torch.float64
        return tensor

    assert record(build).is_meta


def test_tensors_asked_for_on_the_meta_device_are_left_alone() -> None:
    with recording() as recorder:
        made = [torch.ones(2, device="meta"), nn.Linear(2, 2, device="meta").weight]
        with torch.device("meta"):
            made.append(torch.ones(2))
    assert all(tensor.is_meta and recorder.view(tensor) is None for tensor in made)
    assert not recorder.recording.steps


def test_nothing_is_drawn_and_a_failed_constructor_leaves_the_generator() -> None:
    before = torch.get_rng_state()
    record(lambda: nn.Linear(3, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_recordings_in_a_row_do_not_draw_the_same_numbers() -> None:
    first = torch.get_rng_state()
    with recording() as recorder:
        nn.Linear(3, 3)
    recorder.finish()
    assert not torch.equal(torch.get_rng_state(), first)


def test_a_generator_of_another_device_is_refused() -> None:
    class Elsewhere:
        device = torch.device("cuda")

    with recording() as recorder, pytest.raises(PlanError, match="generator of cuda"):
        recorder._before_random(Elsewhere())  # type: ignore[arg-type]


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(PlanError, match="sparse_coo"):
        record(lambda: torch.ones(3, 3).to_sparse())
