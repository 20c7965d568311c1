"""Every array of a batch has a place that a person can find."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest

pytest.importorskip("torch")

import torch

from trainfleet.batch import arrays
from trainfleet.training.inspection.fields import fields_of, places_of

Pair = namedtuple("Pair", "x y")


@dataclass
class Held:
    x: object
    name: str


def test_places_are_as_one_would_write_them() -> None:
    x = torch.ones(2)
    batch = {"a": [x, (x, 3)], "b": Pair(x, x.long()), "c": Held(x, "n")}
    assert [place for place, _ in places_of(batch)] == ["['a'][0]", "['a'][1][0]", "['b'].x", "['b'].y", "['c'].x"]
    assert [place for place, _ in fields_of(batch)] == ["['a'][0]", "['a'][1][0]", "['b'].x", "['c'].x"]
    assert all(one is other for (_, one), other in zip(places_of(batch), arrays(batch)))
    assert list(places_of(x)) == [("", x)]
