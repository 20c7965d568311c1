"""SlowRanks: a line on the rank that the others wait for, when there is one, and not again and again."""

from __future__ import annotations

from trainfleet.events import RanksReported
from trainfleet.monitor.history.ranks import Ranks, SlowRank
from trainfleet.monitor.units import readable_rate


class SlowRanks:
    """Hears the reports of a run. A rank may be late once, so only one that is slow in two in a row is told of."""

    def __init__(self) -> None:
        self._seen: tuple[int, str] | None = None
        """The slowest of the last report and its phase."""
        self._told: tuple[int, str] | None = None

    def line(self, report: RanksReported) -> str:
        """Which rank, which phase, how much; empty where nothing new is to be said."""
        ranks = Ranks()
        ranks.add(report.ranks)
        slow = next(iter(ranks.slow), None)
        now = None if slow is None else (slow.rank, slow.phase)
        before, self._seen = self._seen, now
        if slow is None or now != before:
            self._told = None if slow is None else self._told
            return ""
        if now == self._told:
            return ""
        self._told = now
        return _sentence(slow, ranks, report.steps)


def _sentence(slow: SlowRank, ranks: Ranks, steps: int) -> str:
    took, usually = (f"{readable_rate(each / steps * 1e3)} ms" for each in (slow.phase_seconds, slow.usual_seconds))
    return (
        f"rank {slow.rank} on {slow.host} is slow in {slow.phase}: {took} a step, the others {usually}; "
        f"they wait {slow.lost_seconds / ranks.ranks[slow.rank].seconds:.0%} of the time for it"
    )
