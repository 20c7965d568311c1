"""What is not finite is counted, and its rows are those of samples."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")

import torch

from trainfleet.training.inspection.values import Lines, Tally, Values, is_number, is_sound, lines_of, values_of


def test_values_are_counted_and_told() -> None:
    tensor = torch.tensor([[1.0, math.nan, -3.0], [math.inf, -math.inf, 0.5]])
    values = values_of(tensor)
    assert (values.num_nan, values.num_plus_inf, values.num_minus_inf, values.largest) == (1, 1, 1, 3.0)
    assert str(values) == "1 nan, 1 inf, 1 -inf of 6 (float32 [2, 3]; finite up to 3)"
    assert Values.from_plain(values.to_plain()) == values
    assert not is_sound(tensor) and is_sound(tensor[:, 2]) and not is_sound(tensor.to(torch.complex64))


def test_a_mask_is_told_apart() -> None:
    assert values_of(torch.tensor([0.0, -math.inf])).is_minus_inf_alone
    assert not values_of(torch.tensor([math.nan, -math.inf])).is_minus_inf_alone
    assert not values_of(torch.tensor([0.0])).is_minus_inf_alone
    assert not is_number(torch.tensor([1])) and not is_number("x") and not is_number(torch.ones(1, device="meta"))


@pytest.mark.parametrize(
    ("shape", "bad", "found"),
    [
        ((4, 3), (2, 1), (2,)),  # samples first
        ((12, 3), (7, 0), (2,)),  # three positions of each, flattened
        ((5, 4, 2), (3, 2, 0), (2,)),  # positions first
        ((5, 3), (3, 2), None),
        ((), (), None),
    ],
)
def test_rows_are_those_of_samples(shape: tuple[int, ...], bad: tuple[int, ...], found: tuple[int, ...] | None) -> None:
    tensor = torch.ones(shape)
    tensor[bad] = math.nan
    assert lines_of(tensor).samples_of(4) == found


def test_without_lines_nothing_is_known() -> None:
    assert Lines(()).samples_of(4) is None


def test_a_tally_of_parts_is_that_of_the_whole() -> None:
    whole, one, other = Tally(), Tally(), Tally()
    values = torch.tensor([0.0, 2.0, -4.0, math.nan, 0.0, 1.0])
    whole.add(values)
    one.add(values[:2])
    other.add(values[2:])
    one.join(other)
    assert one == whole
    assert (whole.largest, whole.mean, whole.share_of_zeros, whole.not_finite) == (4.0, -0.2, 2 / 6, 1)
    assert math.isnan(Tally().mean)
