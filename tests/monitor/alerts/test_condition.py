from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfleet.errors import ConfigError
from trainfleet.monitor.alerts.condition import Change, Comparison, OfAnomalies, parse

NAN = math.nan


def fired(line: str, values: list[float], steps: list[int] | None = None) -> list[int]:
    """The steps at which it fires, with a value for each step from 1 on."""
    watch = parse(line).watch()  # type: ignore[union-attr]
    return [step for step, value in zip(steps or range(1, len(values) + 1), values) if watch.update(step, value)]


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("loss > 5", Comparison(name="loss", comparison=">", limit=5.0)),
        ("  loss>5  ", Comparison(name="loss", comparison=">", limit=5.0)),
        ("loss >= 1e-3 for 20 steps", Comparison(name="loss", comparison=">=", limit=0.001, steps=20)),
        ("tokens_per_second < 1_000 for 1 step", Comparison(name="tokens_per_second", comparison="<", limit=1000.0)),
        ("system.disk_free_bytes <= .5", Comparison(name="system.disk_free_bytes", comparison="<=", limit=0.5)),
        ("phases.data != -1.", Comparison(name="phases.data", comparison="!=", limit=-1.0)),
        ('"top 5" == 0', Comparison(name="top 5", comparison="==", limit=0.0)),
        ("mine/rate-2 > inf", Comparison(name="mine/rate-2", comparison=">", limit=math.inf)),
        ("loss rises by 20% in 10 steps", Change(name="loss", rises=True, percent=20.0, span=10)),
        ("x falls by 2.5 % in 1 step for 3 steps", Change(name="x", rises=False, percent=2.5, span=1, steps=3)),
        ("anomaly", OfAnomalies()),
        ("anomaly slow_rank", OfAnomalies(kind="slow_rank")),
    ],
)
def test_a_line_says_what_it_says_and_is_said_again_in_the_same_words(line: str, meant: object) -> None:
    assert parse(line) == meant
    assert parse(str(meant)) == meant


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "which is empty"),
        ("> 5", "does not begin with a name"),
        ("loss", "says nothing about loss"),
        ("loss 5", "a comparison should follow loss, not '5'"),
        ("loss => 5", "a comparison should follow loss, not '=>'"),
        ("loss > high", "a number should follow >"),
        ("loss > 5 for 20", "nothing but `for N steps` can follow 5"),
        ("loss > 5 for 0 steps", "0 steps; use 1 to 100000"),
        ("loss > 5 for 99999999999999999999 steps", "use 1 to 100000"),
        ("loss > 1e999", "1e999 is more than a number can be"),
        ("loss > nan", "nothing is more or less than nan"),
        ("loss rises", "does not say by how much"),
        ("loss rises by 0% in 5 steps", "0% is no change"),
        ("loss falls by 120% in 5 steps", "falls below zero"),
        ("no step for 300 s", "is seen by the watchdog"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(line: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(line)
    assert says in str(caught.value) and str(caught.value).startswith("monitor.alerts has ")


_WORDS = [
    "loss",
    ">",
    ">=",
    "<",
    "==",
    "5",
    "1e3",
    "nan",
    "inf",
    "for",
    "20",
    "steps",
    "step",
    "rises",
    "falls",
    "by",
    "%",
    "in",
    "anomaly",
    "no",
    '"',
    "'",
    ".",
    "-",
    "_",
    "9999999999",
]


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(_WORDS), max_size=12).map(" ".join)))
def test_any_text_is_a_condition_or_refused(text: str) -> None:
    try:
        condition = parse(text)
    except ConfigError as error:
        assert str(error).strip()
    else:
        assert str(parse(str(condition))) == str(condition)


def test_a_long_line_takes_no_long_time() -> None:
    began = time.monotonic()
    for line in ("a" * 100_000, "loss > " + "1" * 100_000 + "x", '"' * 50_000, "loss rises by " + "1_" * 50_000):
        with pytest.raises(ConfigError):
            parse(line)
    assert time.monotonic() - began < 2


def test_it_fires_once_a_crossing_and_again_only_after_it_was_off() -> None:
    assert fired("loss > 5", [1, 6, 7, 6, 5, 6, 4, 9]) == [2, 6, 8]


def test_for_n_steps_it_must_have_held_at_each_of_them() -> None:
    assert fired("loss > 5 for 3 steps", [6, 6, 1, 6, 6, 6, 6, 6]) == [6]


def test_of_values_that_come_seldom_the_steps_between_count() -> None:
    assert fired("validation_loss > 5 for 150 steps", [6, 6, 6, 1], [100, 200, 300, 400]) == [300]
    assert fired("validation_loss > 5 for 100 steps", [6, 1, 6, 6], [100, 200, 300, 400]) == [400]


@pytest.mark.parametrize("comparison", [">", ">=", "<", "<=", "!="])
def test_what_is_not_a_number_is_never_as_it_should_be(comparison: str) -> None:
    assert fired(
        f"loss {comparison} 5 for 2 steps", [NAN, NAN, NAN, 5.0 if comparison in ("!=", ">", "<") else NAN]
    ) == [2]


def test_nan_can_be_asked_for_by_name() -> None:
    assert fired("loss == 5", [NAN]) == [] and fired("loss == nan", [1, NAN, NAN]) == [2]
    assert fired("loss != nan", [NAN, 1]) == [2]


def test_infinity_is_more_than_any_number() -> None:
    assert fired("loss > 5", [math.inf]) == [1] and fired("loss < 5", [math.inf, -math.inf]) == [2]


def test_a_change_is_held_against_the_value_so_many_steps_before() -> None:
    assert fired("loss rises by 50% in 2 steps", [1, 1, 1.4, 1.5, 1.5, 1.5, 3]) == [4, 7]
    assert fired("speed falls by 50% in 2 steps", [100, 100, 80, 50, 40, 40, 40]) == [4]
    assert fired("loss rises by 50% in 100 steps", [1, 9, 99]) == [], "nothing is known so long ago"


def test_a_change_of_negative_and_of_lost_numbers() -> None:
    assert fired("x rises by 50% in 1 step", [-2, -1.5, -0.5]) == [3]
    assert fired("x falls by 50% in 1 step", [-2, -3, -3]) == [2]
    assert fired("x rises by 50% in 1 step", [0, 0, 0.1]) == [3]
    assert fired("x falls by 50% in 1 step", [1, NAN, NAN, 1]) == [2], "from what is no number nothing falls"
