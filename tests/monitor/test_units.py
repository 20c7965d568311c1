from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.monitor.units import (
    percentages,
    readable_bytes,
    readable_duration,
    readable_loss,
    readable_number,
    readable_rate,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (412e6, "412 MB"), (999.6e6, "1.00 GB"), (12.34e9, "12.3 GB")],
)
def test_bytes_are_decimal_with_three_digits(count: float, text: str) -> None:
    assert readable_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (192, "3:12"), (3723, "1:02:03"), (183_840, "2 d 03:04"), (math.nan, "?"), (-1, "?")],
)
def test_durations_read_as_a_clock(seconds: float, text: str) -> None:
    assert readable_duration(seconds) == text


def test_rates_losses_and_numbers_keep_the_digits_that_matter() -> None:
    assert [readable_rate(n) for n in (12345.6, 48.21, 0.5312, math.inf)] == ["12,346", "48.2", "0.531", "?"]
    assert [readable_loss(n) for n in (1.67131, 0.0, 1e-5, 12345.6)] == ["1.6713", "0.0000", "1e-05", "1.235e+04"]
    assert [readable_number(n) for n in (19200, 3.0, 1.67131, 12345.67, "runs/x", True, math.nan)] == [
        "19,200", "3", "1.6713", "12,345.7", "runs/x", "True", "nan",
    ]  # fmt: skip


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1e6), min_size=1))
def test_percentages_add_up_to_a_hundred(shares: dict[str, float]) -> None:
    told = percentages(shares)
    assert not told if sum(shares.values()) == 0 else sum(told.values()) == 100
    whole = sum(shares.values())
    assert all(abs(told[name] - 100 * shares[name] / whole) < 1 for name in told)
    assert percentages({"a": 1, "b": 1, "c": 1}) == {"a": 34, "b": 33, "c": 33}
