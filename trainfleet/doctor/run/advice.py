"""Advice: a finding about a run, and what of the run it costs or endangers, by which advice is put in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from trainfleet.doctor.finding import Finding
from trainfleet.doctor.run.summary import Summary

RESULT = 2.0
"""The gain of what decides whether there is a result at all: more than any time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """What is so, what to turn, and how much there is to be gained."""

    finding: Finding
    gain: float
    """The share of the run's time that this costs, from 0 to 1; RESULT and more where the result is at stake."""


Rule = Callable[[Summary], Iterator[Advice]]
"""Looks at a run; nothing where all is well."""


def advice(subject: str, fact: str, remedy: str, *, gain: float, verdict: Literal["note", "no"] = "note") -> Advice:
    return Advice(finding=Finding(subject=subject, fact=fact, verdict=verdict, remedy=remedy), gain=gain)
