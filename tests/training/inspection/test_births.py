"""What came first is told from what followed from it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from trainfleet.training.inspection.births import Birth, worst
from trainfleet.training.inspection.values import Lines, Values


def birth(at: int, nan: int = 0, inf: int = 0, minus: int = 0, **more: Any) -> Birth:
    values = Values(shape=(4,), dtype="float32", num_nan=nan, num_plus_inf=inf, num_minus_inf=minus, largest=0.0)
    common = {"place": "output", "module": f"m{at}", "tensor": "its output", "call": 1, "caller": ""}
    return Birth(**common, values=values, lines=Lines(()), at=at, **more)


def test_nan_comes_before_infinities_and_these_before_masks() -> None:
    mask, overflow, nan, later = birth(1, minus=1), birth(2, inf=1), birth(3, nan=1), birth(4, nan=1)
    assert worst([later, mask, overflow, nan]) is nan
    assert worst([mask, overflow]) is overflow and worst([mask]) is mask
    nan.is_healed = later.is_healed = True
    assert worst([later, mask, overflow, nan]) is overflow and worst([]) is None


def test_the_root_and_where_it_became_nan() -> None:
    overflow = birth(1, inf=1)
    nan = birth(2, nan=1, inf=1, cause=overflow)
    loss = birth(3, nan=1, cause=nan)
    assert loss.root is overflow and loss.first_nan is nan
    assert overflow.root is overflow and overflow.first_nan is None
