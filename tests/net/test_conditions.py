from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfleet.errors import ConfigError
from trainfleet.net.conditions import (
    PRESETS,
    Conditions,
    Fault,
    bits_per_second,
    byte_count,
    conditions,
    duration,
    readable_rate,
)


def test_what_is_given_takes_the_place_of_the_preset():
    given_ = conditions("mobile", delay="120ms", rate_up="1mbit", loss=0)
    assert given_.delay == timedelta(milliseconds=120) and given_.bits_per_second_up == 1e6 and given_.loss == 0
    assert given_.bits_per_second_down == PRESETS["mobile"].bits_per_second_down
    both = conditions("dsl", rate="5mbit", rate_down="7mbit")
    assert (both.bits_per_second_up, both.bits_per_second_down) == (5e6, 7e6)


def test_without_a_preset_nothing_is_changed():
    assert conditions() == Conditions() and conditions().ceiling() is None


@pytest.mark.parametrize(
    "words, seconds", [("120ms", 0.12), ("1.5 s", 1.5), ("2min", 120), ("50us", 5e-5), (0.25, 0.25)]
)
def test_times_are_read_as_people_write_them(words, seconds):
    assert duration(words) == timedelta(seconds=seconds)


@pytest.mark.parametrize("words, rate", [("10mbit", 1e7), ("1.5 Gbit", 1.5e9), ("64kbit/s", 64e3), (9600, 9600.0)])
def test_rates_are_bits_a_second(words, rate):
    assert bits_per_second(words) == rate


def test_amounts_are_bytes():
    assert [byte_count(words) for words in ("20MB", "64KiB", "7b")] == [20_000_000, 65536, 7]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: duration("120"), "'120' is no time; write a number and a unit, such as 120ms, 1.5s or 2min."),
        (lambda: duration("-1s"), "'-1s' is no time"),
        (lambda: bits_per_second("10mb"), "'10mb' is no rate"),
        (lambda: conditions("adsl"), "There is no link 'adsl'; presets are lan, dsl, mobile, transatlantic."),
        (lambda: conditions(loss=1.0), "loss of the link is 1.0; it is a probability"),
        (lambda: conditions(rate=0), "bits_per_second_up of the link is 0.0; give a rate above 0"),
        (lambda: conditions(delay=-1), "delay of the link is -1 s; a time cannot be negative"),
        (lambda: Fault.parse("cut", "5s"), "cut is '5s'; write how long and when, such as 5s@30s"),
        (lambda: Fault.parse("cut", "5s@"), "cut is '5s@'"),
        (lambda: Fault.parse("pause", "long@3s"), "'long' is no time"),
        (lambda: Fault.parse("pause", "1s@3"), "'3' is no time"),
    ],
)
def test_what_cannot_be_is_refused_in_words(call, words):
    with pytest.raises(ConfigError) as caught:
        call()
    assert words in str(caught.value)


def test_a_fault_begins_at_a_time_or_after_bytes():
    assert Fault.parse("cut", "5s@30s") == Fault(kind="cut", at=timedelta(seconds=30), lasts=timedelta(seconds=5))
    assert Fault.parse("pause", "1s@2MB") == Fault(kind="pause", at=2_000_000, lasts=timedelta(seconds=1))
    assert Fault.parse("half_open", "@1min") == Fault(kind="half_open", at=timedelta(minutes=1))


def test_the_ceiling_under_loss_is_that_of_rfc_9438():
    """Its first table: at a round trip of 0.1 s, CUBIC with C = 0.4 keeps so many segments under way."""
    for loss, segments in ((1e-2, 12), (1e-3, 38), (1e-4, 187), (1e-5, 1054), (1e-6, 5926)):
        rate = Conditions(delay=timedelta(milliseconds=50), loss=loss).ceiling()
        assert rate is not None
        assert rate * 0.1 / (1460 * 8) == pytest.approx(segments, rel=0.02)


def test_links_far_apart_are_slower_under_the_same_loss():
    near, far = (Conditions(delay=timedelta(milliseconds=ms), loss=1e-4).ceiling() for ms in (5, 100))
    assert near is not None and far is not None and near > far


def test_every_preset_says_what_it_is():
    assert str(PRESETS["dsl"]) == "24 ms one way, up to 2 ms of jitter, 14 Mbit/s up, 64 Mbit/s down, 1e-05 lost"
    assert str(Conditions()) == "0 ms one way, no limit up, no limit down"
    assert PRESETS["transatlantic"].round_trip == timedelta(milliseconds=90)
    assert PRESETS["dsl"].round_trip == timedelta(milliseconds=50)
    assert PRESETS["mobile"].round_trip == timedelta(milliseconds=53)


def test_rates_are_readable():
    assert [readable_rate(rate) for rate in (1e9, 999_999, 64e3, 300, None)] == [
        "1 Gbit/s",
        "1 Mbit/s",
        "64 kbit/s",
        "300 bit/s",
        "no limit",
    ]


@given(st.text(max_size=20))
def test_any_words_are_a_fault_or_a_sentence(words):
    try:
        fault = Fault.parse("cut", words)
    except ConfigError:
        return
    assert isinstance(fault.at, (int, timedelta))
