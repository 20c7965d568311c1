"""Tests of nestings in which references stand for tensors."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from trainfleet.parallel.pipeline.graph import Named, Value, references, replaced, signature


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True)
class Held:
    inner: Any
    name: str = "x"


@pytest.mark.parametrize(
    "nested",
    [
        {"a": [Value(1), 2], "b": (Value(2), None)},
        Pair(Value(1), Pair(Value(2), 3)),
        OrderedDict(x=Value(1), y=Value(2)),
        Held(Held([Value(1), Value(2)])),
        (slice(Value(1), Value(2)), torch.Size([3])),
    ],
    ids=lambda nested: type(nested).__name__,
)
def test_references_are_found_and_replaced_in_every_nesting(nested: Any) -> None:
    assert references(nested) == [Value(1), Value(2)]
    twice = replaced(nested, (Value,), lambda value: Value(2 * value.number))
    assert references(twice) == [Value(2), Value(4)]
    assert type(twice) is type(nested)
    assert references(nested) == [Value(1), Value(2)]  # as it was


def test_names_are_references_too() -> None:
    assert references([Named("a", True), "a"]) == [Named("a", True)]


def test_signatures_tell_shapes_and_values_and_not_numbers() -> None:
    batch = {"x": torch.zeros(2, 3), "n": 4}
    assert signature(batch) == signature({"x": torch.ones(2, 3), "n": 4})
    for other in ({"x": torch.zeros(3, 2), "n": 4}, {"x": torch.zeros(2, 3).int(), "n": 4}, {"x": batch["x"], "n": 5}):
        assert signature(batch) != signature(other)
    assert signature(1) != signature(True)
    assert signature(bytearray(b"a")) != signature(bytearray(b"a"))  # unknown: like no other
