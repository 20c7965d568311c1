"""What the ranks of a run reported of themselves, and which of them are slow, in which phase."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainfleet.monitor.history.goodput import finite
from trainfleet.stopwatch import WHOLE

SLOW = 1.1
"""A rank is slow that works so many times as long as the others in the median."""
NO_WORK = ("communication", *WHOLE)
"""Who waits for others does no work; evaluations, saves and observers have duties of the first rank in them."""


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
        """Of its steps, without waiting for others."""
        return sum(seconds for phase, seconds in self.phases.items() if phase not in NO_WORK)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowRank:
    """A rank beside the others: where they are fast, they wait for it in `communication`."""

    rank: int
    host: str
    device: str
    factor: float
    """Of the others' working time, in the median."""
    lost_seconds: float
    """How much longer it works."""
    phase: str
    """Where it loses most."""
    phase_seconds: float
    usual_seconds: float
    """Of the others in that phase, in the median."""


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
        """The slowest first."""
        found = [slow for rank in self.ranks if (slow := self._beside_others(rank)) and slow.factor >= SLOW]
        return sorted(found, key=lambda slow: -slow.factor)

    @property
    def slowest(self) -> SlowRank | None:
        """Who works longest, be it by how little; None where there is but one, or the others do nothing."""
        return self._beside_others(max(self.ranks, key=lambda rank: rank.work_seconds)) if self.ranks else None

    def _beside_others(self, rank: Rank) -> SlowRank | None:
        others = [each for each in self.ranks if each is not rank]
        if not others or (usual := statistics.median(each.work_seconds for each in others)) <= 0:
            return None

        def usually(phase: str) -> float:
            return statistics.median(each.phases.get(phase, 0.0) for each in others)

        works = [phase for phase in rank.phases if phase not in NO_WORK]
        phase = max(works, key=lambda phase: rank.phases[phase] - usually(phase), default="other")
        return SlowRank(
            rank=rank.rank,
            host=rank.host,
            device=rank.device,
            factor=rank.work_seconds / usual,
            lost_seconds=rank.work_seconds - usual,
            phase=phase,
            phase_seconds=rank.phases.get(phase, 0.0),
            usual_seconds=usually(phase),
        )
