"""When an alert fires: one line that a person writes, read once.

    loss > 5                          a comparison with a number: > >= < <= == !=
    loss > 5 for 20 steps             and it has held so long
    tokens_per_second falls by 30% in 200 steps
    anomaly                           any that was seen; `anomaly nan`: of this kind

A name is a number of `StepEnded`, `tokens_per_second` or `samples_per_second`, `phases.NAME`, `waits.NAME`,
`validation_loss` and `validation_NAME`, `system.NAME`, or one that is tracked; in quotes if it has spaces.
"""

from __future__ import annotations

import math
import operator
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from trainfleet.errors import ConfigError

MOST_LETTERS = 500
"""Of a line."""
MOST_STEPS = 100_000
"""Of a rise or fall: so many values are kept."""

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
_NAME = r"""(?P<name>[A-Za-z_][\w./-]*|"[^"]+"|'[^']+')"""
_NUMBER = r"(?P<number>[+-]?(?:(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?|inf|nan))"
_FOR = r"(?:\s+for\s+(?P<steps>\d+)\s+steps?)?"
_COMPARE = re.compile(rf"{_NAME}\s*(?P<comparison>[<>]=?|[=!]=)\s*{_NUMBER}{_FOR}", re.ASCII)
_CHANGE = re.compile(
    rf"{_NAME}\s+(?P<way>rises|falls)\s+by\s+{_NUMBER}\s*%\s+in\s+(?P<span>\d+)\s+steps?{_FOR}", re.ASCII
)
_ANOMALY = re.compile(r"anomaly(?:\s+(?P<kind>[\w-]+))?", re.ASCII)
_NO_STEP = re.compile(r"no\s+step\s+for\b.*", re.DOTALL)
_FORMS = "Write it as `loss > 5`, `loss > 5 for 20 steps`, `loss rises by 50% in 100 steps`, or `anomaly`."


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A number against a limit. One that is not a number is never as it should be: it crosses every limit but `==`."""

    name: str
    comparison: str
    limit: float
    steps: int = 1
    """For how many it must have held."""

    def __str__(self) -> str:
        return f"{_quoted(self.name)} {self.comparison} {self.limit:g}{_for(self.steps)}"

    @property
    def wants_largest(self) -> bool:
        """Which of several ranks' numbers counts: the one that crosses first."""
        return self.comparison in (">", ">=")

    def watch(self) -> Watch:
        return Watch(self.steps, lambda step, value: self.holds(value))

    def holds(self, value: float) -> bool:
        if math.isnan(value) and not math.isnan(self.limit):
            return self.comparison != "=="
        if math.isnan(self.limit):
            return math.isnan(value) == (self.comparison == "==")
        return _COMPARISONS[self.comparison](value, self.limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A number against what it was `span` steps before, or as long ago as is known exactly to the step."""

    name: str
    rises: bool
    percent: float
    span: int
    steps: int = 1

    def __str__(self) -> str:
        way = "rises" if self.rises else "falls"
        return f"{_quoted(self.name)} {way} by {self.percent:g}% in {self.span} steps{_for(self.steps)}"

    @property
    def wants_largest(self) -> bool:
        return self.rises

    def watch(self) -> Watch:
        earlier: deque[tuple[int, float]] = deque()

        def holds(step: int, value: float) -> bool:
            earlier.append((step, value))
            while len(earlier) > 1 and earlier[1][0] <= step - self.span:
                earlier.popleft()
            then_step, then = earlier[0]
            return then_step <= step - self.span and self.holds(then, value)

        return Watch(self.steps, holds)

    def holds(self, then: float, now: float) -> bool:
        if not math.isfinite(then):
            return False  # whatever came after it has not become worse
        if math.isnan(now):
            return True
        change = (now - then) if self.rises else (then - now)
        return change > 0 and change >= abs(then) * self.percent / 100


@dataclass(frozen=True, kw_only=True, slots=True)
class OfAnomalies:
    """Fires at each anomaly that was seen, or at each of a kind."""

    kind: str | None = None

    def __str__(self) -> str:
        return "anomaly" if self.kind is None else f"anomaly {self.kind}"


Condition = Comparison | Change | OfAnomalies


class Watch:
    """Fires when a condition has held for its steps, once, and again only after it did not hold."""

    def __init__(self, steps: int, holds: Callable[[int, float], bool]) -> None:
        self._steps = steps
        self._holds = holds
        self._since: int | None = None
        self._has_fired = False

    def update(self, step: int, value: float) -> bool:
        """True where it fires. Steps without a value neither begin nor end anything."""
        if not self._holds(step, value):
            self._since, self._has_fired = None, False
            return False
        if self._since is None:
            self._since = step
        fires = not self._has_fired and step - self._since + 1 >= self._steps
        self._has_fired |= fires
        return fires


def parse(text: str, *, key: str = "monitor.alerts") -> Condition:
    """The condition that `text` says; ConfigError where it says none."""
    line = text.strip()
    if len(line) > MOST_LETTERS:
        raise ConfigError(
            f"{key} has a line of {len(line)} letters, {text[:40]!r}…; {MOST_LETTERS} are enough. {_FORMS}"
        )
    if (found := _COMPARE.fullmatch(line)) is not None:
        limit = _number(found["number"], text, key)
        if math.isnan(limit) and found["comparison"] not in ("==", "!="):
            raise ConfigError(f"{key} has {text!r}: nothing is more or less than nan. Compare it with == or !=.")
        return Comparison(
            name=_unquoted(found["name"]),
            comparison=found["comparison"],
            limit=limit,
            steps=_steps(found["steps"], text, key),
        )
    if (found := _CHANGE.fullmatch(line)) is not None:
        percent = _number(found["number"], text, key)
        if not 0 < percent < math.inf:
            raise ConfigError(f"{key} has {text!r}: {percent:g}% is no change; use a number above 0.")
        if not found["way"] == "rises" and percent > 100:
            raise ConfigError(f"{key} has {text!r}: what falls by more than 100% falls below zero. Compare it with 0.")
        span = _steps(found["span"], text, key)
        steps = _steps(found["steps"], text, key)
        return Change(
            name=_unquoted(found["name"]), rises=found["way"] == "rises", percent=percent, span=span, steps=steps
        )
    if (found := _ANOMALY.fullmatch(line)) is not None:
        return OfAnomalies(kind=found["kind"])
    if _NO_STEP.fullmatch(line):
        raise ConfigError(
            f"{key} has {text!r}: a step that does not end is seen by the watchdog, not by what it ends with. "
            "Write `anomaly stalled_step`, and set its seconds in monitor.anomalies."
        )
    raise ConfigError(f"{key} has {text!r}, {_reason(line)}. {_FORMS}")


def _reason(line: str) -> str:
    """What is wrong, as far as it can be told."""
    if not line:
        return "which is empty"
    name = re.match(_NAME, line, re.ASCII)
    if name is None:
        return "which does not begin with a name"
    rest = line[name.end() :].strip()
    if not rest:
        return f"which says nothing about {name.group()}"
    if re.match(r"(rises|falls)\b", rest):
        return "which does not say by how much and in how many steps"
    if (sign := re.match(r"[<>]=?|[=!]=", rest)) is None:
        return f"where a comparison should follow {name.group()}, not {rest.split()[0][:20]!r}"
    number = re.match(_NUMBER, rest[sign.end() :].strip())
    if number is None:
        return f"where a number should follow {sign.group()}"
    return f"where nothing but `for N steps` can follow {number.group()}"


def _number(text: str, whole: str, key: str) -> float:
    number = float(text)
    if math.isinf(number) and "inf" not in text:
        raise ConfigError(f"{key} has {whole!r}: {text} is more than a number can be.")
    return number


def _steps(text: str | None, whole: str, key: str) -> int:
    if text is None:
        return 1
    if len(text) > 9 or not 1 <= int(text) <= MOST_STEPS:
        raise ConfigError(f"{key} has {whole!r}: {text} steps; use 1 to {MOST_STEPS}.")
    return int(text)


def _for(steps: int) -> str:
    return "" if steps == 1 else f" for {steps} steps"


def _unquoted(name: str) -> str:
    return name[1:-1] if name[0] in "\"'" else name


def _quoted(name: str) -> str:
    if re.fullmatch(r"[A-Za-z_][\w./-]*", name, re.ASCII):
        return name
    return f'"{name}"' if '"' not in name else f"'{name}'"
