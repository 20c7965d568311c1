"""SlowRank: whether all ranks wait for one of them, and in which phase that one is slow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from trainfleet.events import RanksReported
from trainfleet.monitor.anomalies.finding import Finding, Spell
from trainfleet.stopwatch import PHASES, WHOLE

NOT_WORK = ("communication", *WHOLE)
"""Waiting for others is no work; evaluations, saves and observers have the first rank's own duties in them."""
ENOUGH = 3
"""Reports in a row that find the same rank slow."""
MATTERS = 0.1
"""Share of a step's time that the others lose by it at least."""


class SlowRank:
    """Compares what ranks work at each step, beside waiting for one another. All ranks see the same reports."""

    kind = "slow_rank"

    def __init__(self, *, factor: float, lasting_seconds: float) -> None:
        self._factor, self._lasting = factor, lasting_seconds
        self._num_reports = 0
        self._suspect: int | None = None
        self._in_a_row = 0
        self._seconds = 0.0
        self._told: int | None = None
        self._spell = Spell(calm=ENOUGH)

    def hear(self, report: RanksReported) -> Finding | None:
        """What the report says, with those before it."""
        self._num_reports += 1
        if len(report.ranks) < 2 or self._num_reports == 1:  # the first warms up
            return None
        slowest, ratio, phase = slowest_of(report.ranks)
        seconds = float(report.ranks[slowest]["seconds"])
        if ratio < self._factor or self._lost(report, slowest) < MATTERS * seconds:
            self._suspect, self._in_a_row, self._seconds = None, 0, 0.0
            return self._over(report)
        if slowest != self._suspect:
            self._suspect, self._in_a_row, self._seconds = slowest, 0, 0.0
        self._in_a_row += 1
        self._seconds += seconds
        if self._in_a_row < ENOUGH or self._seconds < self._lasting or not self._spell.begins(report.step):
            return None
        self._told = slowest
        host = report.ranks[slowest]["host"]
        what = (
            f"Rank {slowest} on {host} works {ratio:.1f} times as long as the others at each step, "
            f"which wait for it; it is slow in {phase}"
        )
        return Finding(kind=self.kind, what=what, rank=slowest)

    def _lost(self, report: RanksReported, slowest: int) -> float:
        return work_of(report.ranks[slowest]) - _of_others(report.ranks, slowest)

    def _over(self, report: RanksReported) -> Finding | None:
        since = self._spell.ends()
        if since is None:
            return None
        what = f"Rank {self._told} works as long as the others again, after {report.step - since} steps"
        return Finding(kind=self.kind, what=what, is_over=True, rank=self._told)


def work_of(rank: Mapping[str, object]) -> float:
    """Seconds that a rank worked, of its report."""
    return sum(_phase(rank, phase) for phase in PHASES if phase not in NOT_WORK)


def slowest_of(ranks: object) -> tuple[int, float, str]:
    """The rank that worked longest, by what factor longer than the median of the others, and mostly in which phase."""
    assert isinstance(ranks, list | tuple)
    slowest = max(range(len(ranks)), key=lambda rank: work_of(ranks[rank]))
    others = _of_others(ranks, slowest)
    ratio = work_of(ranks[slowest]) / others if others > 0 else float("inf")
    phases = [phase for phase in PHASES if phase not in NOT_WORK]

    def more(phase: str) -> float:
        usual = statistics.median(_phase(each, phase) for rank, each in enumerate(ranks) if rank != slowest)
        return _phase(ranks[slowest], phase) - usual

    return slowest, ratio, max(phases, key=more)


def _of_others(ranks: object, slowest: int) -> float:
    assert isinstance(ranks, list | tuple)
    return statistics.median(work_of(each) for rank, each in enumerate(ranks) if rank != slowest)


def _phase(rank: Mapping[str, object], phase: str) -> float:
    phases = rank["phases"]
    return float(phases.get(phase, 0.0)) if isinstance(phases, Mapping) else 0.0
