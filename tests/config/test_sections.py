from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest

from trainfleet.config.sections import REQUIRED, describe, key_names, meanings_of, section_of, type_in_words
from trainfleet.errors import ConfigError
from trainfleet.plan import LossScale, Plan

if TYPE_CHECKING:
    from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class Base:
    steps: int
    """How many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inherits(Base):
    plan: Plan = field(default_factory=lambda: Plan(zero=3))
    scale: LossScale | None = None
    """Of fp16,
    if at all."""
    folder: Path = Path("runs")


def test_every_key_comes_with_type_default_and_the_string_below_it():
    keys = {key.key: key for key in describe(Inherits)}
    assert keys["steps"] == ("steps", "whole number", REQUIRED, "How many.")
    assert keys["plan.zero"].default == 3, "the default of the section that holds it, not of its class"
    assert keys["plan.zero"].meaning.startswith("What is split over the data-parallel ranks")
    assert keys["scale"] == ("scale", "section or null", None, "Of fp16, if at all.")
    assert keys["scale.window"].default == 2000
    assert "plan" not in keys, "a section is no key of its own where it cannot be left out"
    assert list(keys) == list(key_names(Inherits))


def test_every_key_of_a_plan_has_a_meaning():
    assert [key.key for key in describe(Plan) if not key.meaning] == []


def test_meanings_of_a_class_in_a_function_are_found():
    @dataclass
    class Local:
        a: int = 1
        """One."""
        b: int = 2

    assert meanings_of(Local) == {"a": "One."}


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "whole number or null"),
        (Literal["a", "b"] | None, "one of a, b or null"),
        (Literal[True, "off"], "one of true, 'off'"),
        (tuple[str, ...], "list of text"),
        (tuple[float, float], "list of 2: number, number"),
        (list[int], "list of whole number"),
        (dict[str, Any], "mapping"),
        (timedelta, "seconds"),
        (Annotated[int, "x"], "whole number"),
        (Callable[..., Any], "function"),
        (str | tuple[str, ...], "text or list of text"),
        (LossScale, "section"),
    ],
)
def test_types_are_said_in_words(hint, words):
    assert type_in_words(hint) == words


def test_a_section_is_found_in_a_union_with_a_short_form():
    assert section_of(LossScale | str | None) is LossScale
    assert section_of(LossScale | Plan) is None
    assert section_of(dict[str, LossScale]) is None


def test_a_type_that_exists_only_for_the_checker_is_one_sentence():
    @dataclass
    class Broken:
        share: Fraction

    with pytest.raises(ConfigError, match="Fraction"):
        describe(Broken)
