"""What an emulated link is like: delay, jitter, rates, loss, corruption, and when it fails.

Times and rates may be written as people say them: `120ms`, `1.5s`, `10mbit`, `64 kbit`, `5MB`. Rates are bits a second
in decimal units, as links are sold; amounts are bytes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

from trainfleet.errors import ConfigError

Duration = timedelta | float | str
"""A time, seconds, or words such as `120ms`."""
Rate = float | str
"""Bits a second, or words such as `10mbit`."""
FaultKind = Literal["cut", "close", "half_open", "pause"]

_TIME_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_BIT_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_BYTE_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
SEGMENT_BYTES = 1460  # what a TCP segment carries on Ethernet: 1500 - 20 - 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """A link between two hosts. *up* is from who dials to the target, *down* is back."""

    delay: timedelta = timedelta(0)
    """One way; a round trip takes twice as long."""
    jitter: timedelta = timedelta(0)
    """Bytes take from `delay` to `delay + jitter`, evenly spread, and stay in order."""
    bits_per_second_up: float | None = None
    """Of all connections together; None is as fast as this host can."""
    bits_per_second_down: float | None = None
    loss: float = 0.0
    """Probability that a segment of 1,460 bytes is lost. TCP sends it again: what a program sees is that it, and all
    behind it, come a round trip later, and that one connection is slower (see `ceiling`)."""
    corruption: float = 0.0
    """Probability that a bit of a byte is flipped, beyond what checksums of TCP find."""

    def __post_init__(self) -> None:
        for name in ("delay", "jitter"):
            if (seconds := getattr(self, name).total_seconds()) < 0:
                raise ConfigError(f"{name} of the link is {seconds:g} s; a time cannot be negative.")
        for name in ("bits_per_second_up", "bits_per_second_down"):
            rate = getattr(self, name)
            if rate is not None and not (0 < rate < math.inf):
                raise ConfigError(f"{name} of the link is {rate}; give a rate above 0, or None for no limit.")
        for name in ("loss", "corruption"):
            if not 0 <= (share := getattr(self, name)) < 1:
                raise ConfigError(f"{name} of the link is {share}; it is a probability, from 0 to below 1.")

    @property
    def round_trip(self) -> timedelta:
        """Of a small message, on the average, where nothing else is under way."""
        return 2 * self.delay + self.jitter

    def ceiling(self) -> float | None:
        """Bits a second that one connection keeps up under this loss; None where nothing is lost.

        The larger of Reno's 1.22 segments / sqrt(p) and CUBIC's 1.054 (round trip / p) ^ 3/4, per round trip
        (RFC 9438, section 5; Mathis et al. 1997). Several connections side by side reach several times as much.
        """
        seconds = self.round_trip.total_seconds()
        if not self.loss or not seconds:
            return None
        window: float = max(1.22 / math.sqrt(self.loss), 1.054 * (seconds / self.loss) ** 0.75)
        return window * SEGMENT_BYTES * 8 / seconds

    def __str__(self) -> str:
        parts = [f"{_milliseconds(self.delay)} one way"]
        if self.jitter:
            parts.append(f"up to {_milliseconds(self.jitter)} of jitter")
        rates = (self.bits_per_second_up, self.bits_per_second_down)
        parts.append(f"{readable_rate(rates[0])} up, {readable_rate(rates[1])} down")
        parts += [f"{share:.3g} {what}" for share, what in ((self.loss, "lost"), (self.corruption, "flipped")) if share]
        return ", ".join(parts)


PRESETS = {
    # 1000BASE-T (IEEE 802.3ab) and one switch; a round trip of 0.2 ms is what hosts in one room see.
    "lan": Conditions(delay=timedelta(microseconds=100), bits_per_second_up=1e9, bits_per_second_down=1e9),
    # Rates: the average of home lines in the United Kingdom in November 2019, 64.0 and 14.0 Mbit/s (Ofcom, UK Home
    # Broadband Performance, May 2020). Round trip: 50 ms, the DSL profile of WebPageTest.
    "dsl": Conditions(
        delay=timedelta(milliseconds=24),
        jitter=timedelta(milliseconds=2),
        bits_per_second_up=14.0e6,
        bits_per_second_down=64.0e6,
        loss=1e-5,
    ),
    # 4G in British cities in late 2014: 14.7 and 13.6 Mbit/s, 53.1 ms (Ofcom, Measuring mobile broadband performance).
    "mobile": Conditions(
        delay=timedelta(milliseconds=20),
        jitter=timedelta(milliseconds=13),
        bits_per_second_up=13.6e6,
        bits_per_second_down=14.7e6,
        loss=2e-4,
    ),
    # London to New York: 90 ms is what Verizon's service level agreement promises for the round trip.
    "transatlantic": Conditions(
        delay=timedelta(milliseconds=44),
        jitter=timedelta(milliseconds=2),
        bits_per_second_up=1e9,
        bits_per_second_down=1e9,
        loss=1e-5,
    ),
}
"""Links that people have. Delay and rates are from the sources named. Jitter and loss are round numbers of ours: what
is published of them are bounds (at most 0.5 % over the Atlantic, by the same agreement) and no averages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something that happens to a link once."""

    kind: FaultKind
    at: timedelta | int
    """Since the link was opened; or after that many bytes, both ways together."""
    lasts: timedelta | None = None
    """None: until `restore`."""

    @staticmethod
    def parse(kind: FaultKind, words: str) -> Fault:
        """`5s@30s` lasts 5 s, 30 s after the start; `5s@20MB` begins after 20 MB; `@30s` lasts for ever."""
        lasts, at_sign, at = words.partition("@")
        if not at_sign or not at:
            raise ConfigError(f"{kind} is {words!r}; write how long and when, such as 5s@30s, 5s@20MB or @30s.")
        when = byte_count(at) if _match(at, _BYTE_UNITS) else duration(at)
        return Fault(kind=kind, at=when, lasts=duration(lasts) if lasts else None)


def conditions(
    preset: str | None = None,
    *,
    delay: Duration | None = None,
    jitter: Duration | None = None,
    rate: Rate | None = None,
    rate_up: Rate | None = None,
    rate_down: Rate | None = None,
    loss: float | None = None,
    corruption: float | None = None,
) -> Conditions:
    """Those of a preset, or of a wire that changes nothing, with what is given in its place; `rate` is both ways."""
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"There is no link {preset!r}; presets are {', '.join(PRESETS)}.")
    chosen = {
        "delay": None if delay is None else duration(delay),
        "jitter": None if jitter is None else duration(jitter),
        "bits_per_second_up": _first_rate(rate_up, rate),
        "bits_per_second_down": _first_rate(rate_down, rate),
        "loss": loss,
        "corruption": corruption,
    }
    base = PRESETS[preset] if preset else Conditions()
    return replace(base, **{name: value for name, value in chosen.items() if value is not None})  # type: ignore[arg-type]


def duration(value: Duration) -> timedelta:
    """`timedelta`, seconds, or words such as `120ms`, `5s`, `2min`."""
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str):
        return timedelta(seconds=value)
    return timedelta(seconds=_measure(value, _TIME_UNITS, "time", "120ms, 1.5s or 2min"))


def bits_per_second(value: Rate) -> float:
    """A number, or words such as `10mbit`, `1.5 gbit`."""
    words = value.lower().removesuffix("/s") if isinstance(value, str) else value
    return _measure(words, _BIT_UNITS, "rate", "64kbit, 10mbit or 1gbit") if isinstance(words, str) else float(words)


def byte_count(words: str) -> int:
    """`20MB`, `64KiB`, `1000B`."""
    return round(_measure(words, _BYTE_UNITS, "amount of bytes", "20MB or 64KiB"))


def readable_rate(rate: float | None) -> str:
    """`10 Mbit/s`; `no limit` for None."""
    if rate is None:
        return "no limit"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rate >= size * 0.9995:
            return f"{rate / size:.3g} {unit}bit/s"
    return f"{rate:.3g} bit/s"


def _first_rate(*rates: Rate | None) -> float | None:
    return next((bits_per_second(rate) for rate in rates if rate is not None), None)


def _match(words: str, units: dict[str, float] | dict[str, int]) -> re.Match[str] | None:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", words.lower())
    return found if found and found[2] in units else None


def _measure(words: str, units: dict[str, float] | dict[str, int], what: str, such_as: str) -> float:
    found = _match(words, units)
    if found is None:
        raise ConfigError(f"{words!r} is no {what}; write a number and a unit, such as {such_as}.")
    return float(found[1]) * units[found[2]]


def _milliseconds(time: timedelta) -> str:
    return f"{time.total_seconds() * 1000:g} ms"
