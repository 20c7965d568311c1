"""SlowRank: whether all ranks wait for one of them, and in which phase that one is slow."""

from __future__ import annotations

from trainfleet.events import RanksReported
from trainfleet.monitor.anomalies.finding import Finding, Spell
from trainfleet.monitor.history.ranks import Ranks

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
        ranks = Ranks()
        ranks.add(report.ranks)
        slow = ranks.slowest
        if slow is None or self._num_reports == 1:  # the first warms up
            return None
        seconds = ranks.ranks[slow.rank].seconds
        if slow.factor < self._factor or slow.lost_seconds < MATTERS * seconds:
            self._suspect, self._in_a_row, self._seconds = None, 0, 0.0
            return self._over(report)
        if slow.rank != self._suspect:
            self._suspect, self._in_a_row, self._seconds = slow.rank, 0, 0.0
        self._in_a_row += 1
        self._seconds += seconds
        if self._in_a_row < ENOUGH or self._seconds < self._lasting or not self._spell.begins(report.step):
            return None
        self._told = slow.rank
        what = (
            f"Rank {slow.rank} on {slow.host} works {slow.factor:.1f} times as long as the others at each step, "
            f"which wait for it; it is slow in {slow.phase}"
        )
        return Finding(kind=self.kind, what=what, rank=slow.rank)

    def _over(self, report: RanksReported) -> Finding | None:
        since = self._spell.ends()
        if since is None:
            return None
        what = f"Rank {self._told} works as long as the others again, after {report.step - since} steps"
        return Finding(kind=self.kind, what=what, is_over=True, rank=self._told)
