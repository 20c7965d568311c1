"""What the ranks of a run reported of themselves, and which of them are slow, in which phase."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainfleet.monitor.history.goodput import finite

SLOW = 1.1
"""A rank is slow that works so many times as long as the median rank."""
WAITING = "communication"
"""The phase in which fast ranks wait for slow ones: it tells nothing against whoever is in it."""


@dataclass(kw_only=True, slots=True)
class Rank:
    """One rank over all its reports."""

    rank: int
    host: str = ""
    device: str = ""
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    memory_bytes: int = 0
    """The most it reported."""
    system: Mapping[str, Any] = field(default_factory=dict)
    """Its last numbers of the machine."""

    @property
    def work_seconds(self) -> float:
        """In which it did not wait for others."""
        return sum(seconds for phase, seconds in self.phases.items() if phase != WAITING)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowRank:
    rank: int
    host: str
    factor: float
    """Of the median rank's working time."""
    phase: str
    """Where it loses most against the median."""


class Ranks:
    """Adds up the reports of the steps that stand."""

    def __init__(self) -> None:
        self.ranks: list[Rank] = []

    def add(self, reports: Any) -> None:
        """`reports`: `RanksReported.ranks` as the file has it; what is not a report is left out."""
        if not isinstance(reports, Sequence) or isinstance(reports, str):
            return
        for number, report in enumerate(reports):
            if not isinstance(report, Mapping):
                continue
            while len(self.ranks) <= number:
                self.ranks.append(Rank(rank=len(self.ranks)))
            rank = self.ranks[number]
            rank.host, rank.device = str(report.get("host", "")), str(report.get("device", ""))
            rank.seconds += finite(report.get("seconds"))
            rank.memory_bytes = max(rank.memory_bytes, int(finite(report.get("memory_bytes"))))
            phases, system = report.get("phases"), report.get("system")
            if isinstance(phases, Mapping):
                for phase, seconds in phases.items():
                    rank.phases[phase] = rank.phases.get(phase, 0.0) + finite(seconds)
            if isinstance(system, Mapping) and system:
                rank.system = system

    @property
    def slow(self) -> list[SlowRank]:
        """The slowest first; of two ranks the faster is the median."""
        if len(self.ranks) < 2:
            return []
        median = statistics.median_low([rank.work_seconds for rank in self.ranks])
        if median <= 0:
            return []
        found = []
        for rank in self.ranks:
            if (factor := rank.work_seconds / median) < SLOW:
                continue
            lost = {
                phase: seconds - statistics.median_low([each.phases.get(phase, 0.0) for each in self.ranks])
                for phase, seconds in rank.phases.items()
                if phase != WAITING
            }
            phase = max(lost, key=lambda name: lost[name])
            found.append(SlowRank(rank=rank.rank, host=rank.host, factor=factor, phase=phase))
        return sorted(found, key=lambda slow: -slow.factor)
