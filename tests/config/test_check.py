from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest

from trainfleet.config.check import Refused, checked


@pytest.mark.parametrize(
    ("hint", "value", "wanted"),
    [
        (float, 5, 5.0),
        (int, 1e4, 10_000),
        (int | None, None, None),
        (tuple[str, ...], ["a"], ("a",)),
        (tuple[float, float], [1, 2], (1.0, 2.0)),
        (Path, "a/b", Path("a/b")),
        (Path, Path("a"), Path("a")),
        (timedelta, 5, timedelta(seconds=5)),
        (timedelta, timedelta(hours=1), timedelta(hours=1)),
        (timedelta, "PT1M", timedelta(minutes=1)),
        (Any, (1, 2), (1, 2)),
        (dict[str, Any], {"a": int}, {"a": int}),
        (str | tuple[str, ...], ["a"], ("a",)),
        (Literal["a", 1], "a", "a"),
    ],
)
def test_a_value_takes_the_form_its_type_wants(hint, value, wanted):
    got = checked(hint, value)
    assert got == wanted and type(got) is type(wanted)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, True),
        (float, True),
        (int, "3"),
        (int, 2.5),
        (int, math.inf),
        (bool, 1),
        (bool, "true"),
        (str, 3),
        (Literal[0, 1], True),
        (Literal["a", "b"], "c"),
        (tuple[float, float], [1]),
        (tuple[float, ...], [True]),
        (list[int], "12"),
        (timedelta, True),
        (timedelta, 1e300),
        (dict[str, int], {"a": "b"}),
    ],
)
def test_no_value_changes_its_kind(hint, value):
    with pytest.raises(Refused, match=r"^allowed: "):
        checked(hint, value)


def test_the_text_of_a_flag_stays_a_text_where_a_text_is_wanted():
    assert checked(str, 7, text="007") == "007"
    assert checked(str | None, None, text="null") is None
    with pytest.raises(Refused, match="put it in quotes"):
        checked(str, 7)


def test_the_wrong_part_of_a_list_is_named():
    with pytest.raises(Refused, match=r"list of whole number \(1: "):
        checked(list[int], [1, "x"])
